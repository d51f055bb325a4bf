"""From FP8 back to FP32."""

from __future__ import annotations

import torch

from fp8moe.kernels import reference
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div
from fp8moe.quant.casts import check_fp8_tensor


def dequantize(t: FP8Tensor) -> torch.Tensor:
    """x[..., i, j] = float(data[..., i, j]) * scale[..., i or i // 128, j // 128].

    The scale's shape tells the granularity: one row per row of data is per_token, one per 128 rows
    is per_block. A per_channel tensor, data (N, R) with scale (N, R/128), reads like a per_token
    one and comes back transposed as it is stored, pad columns as zeros and the undefined columns
    past the last group as whatever they hold.

    Args:
        t: data ([E,] N, K) float8_e4m3fn; scale ([E,] N, ceil(K/128)) or
            ([E,] ceil(N/128), ceil(K/128)) float32. Any strides.

    Returns:
        ([E,] N, K) float32, contiguous. The product is exact when the scale is a power of two,
        otherwise rounded once.

    Raises:
        ValueError: t is not a pair; a dtype, the device or the scale's shape does not fit the data.
    """
    check_fp8_tensor("t", t)
    data, scale = t
    if data.dtype != FP8_DTYPE:
        raise ValueError(f"t.data: expected dtype {FP8_DTYPE}, got {data.dtype}")
    if scale.dtype != torch.float32:
        raise ValueError(f"t.scale: expected dtype {torch.float32}, got {scale.dtype}")
    if scale.device != data.device:
        raise ValueError(f"t.scale: expected device {data.device}, got {scale.device}")
    if data.ndim not in (2, 3):
        raise ValueError(f"t.data: expected 2 or 3 dimensions, got {tuple(data.shape)}")
    *groups, n, k = data.shape
    kb = ceil_div(k, BLOCK)
    per_token, per_block = (*groups, n, kb), (*groups, ceil_div(n, BLOCK), kb)
    if tuple(scale.shape) == per_token:
        return reference.dequantize_per_token(data, scale)
    if tuple(scale.shape) == per_block:
        return reference.dequantize_per_block(data, scale)
    raise ValueError(
        f"t.scale: expected {per_token} (per_token, per_channel) or {per_block} (per_block) "
        f"for data {tuple(data.shape)}, got {tuple(scale.shape)}"
    )
