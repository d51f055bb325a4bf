"""Quantization to FP8: `FP8Tensor` and the casts that make one, its transpose and its inverse."""

from fp8moe.kernels.fp8tensor import FP8Tensor
from fp8moe.quant.casts import (
    per_block,
    per_block_both,
    per_channel,
    per_token,
    transpose_per_block,
)
from fp8moe.quant.dequantize import dequantize

__all__ = [
    "FP8Tensor",
    "dequantize",
    "per_block",
    "per_block_both",
    "per_channel",
    "per_token",
    "transpose_per_block",
]
