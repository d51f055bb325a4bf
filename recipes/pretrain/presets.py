"""The sizes that ``--preset`` chooses from, with the reckoning behind each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .config import Config, UserError, option

# Two cores: 3.2 M parameters and 2048 tokens a step, so that 450 steps of both twins take about
# five minutes. Width and inner width are multiples of 128: the FP8 twin takes the fused path of
# the expert layer, the one that a GPU runs.
CPU = Config()

# One H100. Parameters: 6 layers x 16 experts x 3 x 1024 x 1536 = 453 M in the experts, 26 M around
# them; 82 M meet a token. A step is 32,768 tokens, 4096 rows an expert, so the forward GEMMs are
# 4096 x 3072 x 1024 and 4096 x 1024 x 1536. FLOP a step and twin: 11.1 T in the experts (19 ms at
# 600 TFLOP/s), 6.3 T around them. Memory a twin: 16 bytes a parameter for weight, gradient and
# AdamW's moments (7.7 GB), 2 for the FP8 or BF16 copies, and some 2 GB of activations a layer.
# Both twins fit in 80 GB because only the one whose turn it is holds gradients, copies and
# activations. A checkpoint of both is 11.5 GB, so only two are written and one is kept.
H100 = Config(
    device="cuda",
    layers=6,
    d_model=1024,
    heads=8,
    experts=16,
    top_k=2,
    d_expert=1536,
    seq_len=1024,
    batch_size=32,
    steps=1000,
    lr=3e-4,
    warmup_steps=200,
    log_every=20,
    eval_every=200,
    eval_batches=4,
    observe_every=50,
    checkpoint_every=500,
    keep=1,
    sample_bytes=300,
)

PRESETS = {"cpu": CPU, "h100": H100}


def has_hopper() -> bool:
    """Whether the current GPU is one that the FP8 kernels run on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def choose(preset: str | None, overrides: dict[str, Any]) -> tuple[str, Config]:
    """The named preset, or the one that suits this machine, with the given values replaced."""
    name = preset if preset is not None else ("h100" if has_hopper() else "cpu")
    if name not in PRESETS:
        raise UserError(f"--preset: expected one of {', '.join(PRESETS)}, got {name}")
    config = dataclasses.replace(PRESETS[name], **overrides)
    config.check()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--{option('device')} cuda (preset {name}): torch {torch.__version__} sees no GPU "
            "here; use --preset cpu or --device cpu"
        )
    return name, config
