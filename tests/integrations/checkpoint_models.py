"""Models whose checkpoints are tested, their logits, and the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

pytest.importorskip("accelerate")
safetensors_torch = pytest.importorskip("safetensors.torch")

VOCAB = tiny_models.SIZES["vocab_size"]
_CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen3_moe, tied": {"tie_word_embeddings": True},
    "mixtral": {},
    "olmoe": {},
    "deepseek_v3": {"first_k_dense_replace": 1},
}
NAMES = list(_CHANGES)


def build(name: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Two layers, in evaluation mode, with the experts implementation of transformers."""
    kind, changes = name.partition(",")[0], {"initializer_range": 0.02} | _CHANGES[name] | changes
    model = tiny_models.build(kind, 2, implementation=None, dtype=dtype, **changes)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):  # as from_pretrained has it, and not zero
            module = model.get_submodule(key.rpartition(".")[0])
            module.e_score_correction_bias = torch.linspace(0, 0.1, buffer.numel())
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24) % VOCAB
    with torch.no_grad():
        return model.eval()(ids).logits


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(safetensors_torch.load_file(path))
    return found
