"""What a run is asked for: presets, options, and their checks."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recipes.pretrain.config import UserError

BYTES = 256  # vocabulary of the random models: one token per byte value

_SHARED_CONFIG = {
    "vocab_size": BYTES,
    "bos_token_id": None,
    "eos_token_id": 0,  # the byte that ends a file of the text
    "pad_token_id": None,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}

QWEN3_MOE: dict[str, dict[str, Any]] = {
    "cpu": _SHARED_CONFIG
    | {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    },
    "h100": _SHARED_CONFIG
    | {
        "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 1024,
    },
}  # fmt: skip
"""The Qwen3-MoE models with random weights that a run builds when no --model is given."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. The defaults are those of the cpu preset."""

    preset: str = "cpu"
    model: str | None = None
    mode: Literal["full", "lora"] | None = None  # None: full for random weights, else lora
    experts: Literal["fp8", "bf16", "both"] = "fp8"
    data: str | None = None
    pattern: str | None = None
    valid_fraction: float = 0.02
    steps: int = 60
    seq_len: int = 128
    batch_size: int = 8
    grad_accumulation: int = 1
    lr: float = 3e-3
    warmup_steps: int = 5
    eval_sequences: int = 32
    log_every: int = 10
    lora_rank: int = 16
    lora_alpha: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    device: str = "cpu"
    seed: int = 0
    export_fp8: bool = False

    @property
    def lora(self) -> bool:
        return self.mode == "lora" or (self.mode is None and self.model is not None)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The experts to train, one model after the other; the last one is exported."""
        return ("bf16", "fp8") if self.experts == "both" else (self.experts,)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation * self.seq_len

    def check(self) -> None:
        """Raises UserError for what cannot be done, before anything is loaded."""
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:  # false for NaN too
                raise UserError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
        if not 0 <= self.warmup_steps < self.steps:
            raise UserError(
                f"--warmup-steps: expected 0 to {self.steps - 1} (--steps {self.steps}), "
                f"got {self.warmup_steps}"
            )
        if not 0 < self.valid_fraction <= 0.5:
            raise UserError(f"--valid-fraction: expected 0 to 0.5, got {self.valid_fraction}")
        if self.lora and self.lora_rank % 8:
            raise UserError(f"--lora-rank: expected a multiple of 8, got {self.lora_rank}")
        if self.lora and self.experts != "fp8":
            raise UserError(
                f"--experts {self.experts}: with --lora the experts are frozen in FP8; add --full"
            )
        if self.export_fp8 and self.experts == "bf16":
            raise UserError("--export-fp8: expected --experts fp8 or both, got bf16")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here")
        if self.device == "cuda" and torch.cuda.device_count() > 1:
            # The Trainer would wrap the model in DataParallel.
            raise UserError(
                f"--device cuda: expected one GPU, found {torch.cuda.device_count()}; "
                "set CUDA_VISIBLE_DEVICES to one of them"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("expected one process: this recipe trains on one device")


_POSITIVE = (
    "steps", "seq_len", "batch_size", "grad_accumulation", "lr", "eval_sequences", "log_every",
    "lora_rank", "lora_alpha",
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {
        "device": "cuda", "dtype": "bfloat16", "experts": "both", "steps": 60, "seq_len": 2048,
        "batch_size": 16, "lr": 3e-4, "warmup_steps": 10, "eval_sequences": 64,
    },
}  # fmt: skip

# What changes with adapters, with --model, and with both.
_LORA = {"experts": "fp8"}
_MODEL = {
    "experts": "fp8", "batch_size": 1, "grad_accumulation": 8, "gradient_checkpointing": True,
    # Updates of this size would be lost in BF16 weights.
    "lr": 1e-5, "dtype": "float32",
}  # fmt: skip
_MODEL_LORA = {"lr": 2e-4, "dtype": "bfloat16"}


def choose(preset: str | None, overrides: dict[str, Any]) -> Settings:
    """The preset's settings (without one: h100 on a Hopper GPU, else cpu) with some replaced.

    Raises: UserError.
    """
    if preset is None:
        hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
        preset = "h100" if hopper else "cpu"
    values = PRESETS[preset] | {"preset": preset}
    asked = Settings(**overrides)
    if asked.lora:
        values |= _LORA
    if asked.model is not None:
        values |= _MODEL | (_MODEL_LORA if asked.lora else {})
    settings = Settings(**(values | overrides))
    if "warmup_steps" not in overrides:  # a short run that was asked for warms up shorter
        warmup_steps = min(settings.warmup_steps, max(settings.steps - 1, 0))
        settings = dataclasses.replace(settings, warmup_steps=warmup_steps)
    settings.check()
    return settings
