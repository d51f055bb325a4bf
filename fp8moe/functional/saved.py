"""Activations kept for backward in FP8, and back."""

from __future__ import annotations

import torch

from fp8moe.config import FP8Config
from fp8moe.functional.observe import report
from fp8moe.kernels import reference
from fp8moe.kernels.cast import cast_per_token
from fp8moe.kernels.fp8tensor import BLOCK, FP8Tensor, empty_scale, scale_ld


def restore(data: torch.Tensor, scale: torch.Tensor) -> FP8Tensor:
    """The FP8Tensor of two saved tensors, its scale MN-major.

    Saved-tensor hooks, offloading to the host for one, give tensors back with other strides.
    """
    rows, blocks = scale.shape
    if scale.stride() != (1, scale_ld(rows)):
        scale = empty_scale(rows, blocks, scale.device).copy_(scale)
    return FP8Tensor(data, scale)


def compress(h: torch.Tensor, row_of_slot: torch.Tensor, config: FP8Config) -> FP8Tensor:
    """h in FP8, to be saved for backward with save="fp8"."""
    h8 = FP8Tensor(*cast_per_token(h, config.pow2_scales))
    report("h", h8, row_of_slot)
    return h8


def expand(h8: FP8Tensor, config: FP8Config) -> torch.Tensor:
    """data * scale in BF16; exact for power-of-two scales, which BF16 holds."""
    if h8.data.shape[1] % BLOCK:
        return reference.dequantize_per_token(h8.data, h8.scale).bfloat16()
    scale = h8.scale.bfloat16() if config.pow2_scales else h8.scale
    blocks = h8.data.bfloat16().unflatten(1, (-1, BLOCK)) * scale.unsqueeze(-1)
    h = blocks.flatten(1)
    # Not a plain .bfloat16(): where that returns h itself, torch 2.11 compiles zero gradients.
    return h if h.dtype == torch.bfloat16 else h.bfloat16()
