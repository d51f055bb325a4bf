"""The FP8 tensor pair and the sizes and layouts every kernel agrees on."""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 128
"""Elements of K that share one scale, and the row alignment of an expert's group."""

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite E4M3 value."""

FP8_NAN_BYTE = 0x7F

AMAX_FLOOR = 2.0**-48
"""Smallest block maximum: keeps scales >= 2**-57 and the product of two scales a normal FP32."""

FLOOR_SCALE_POW2 = 2.0**-56
"""Power-of-two scale of an all-zero block (AMAX_FLOOR / 448 rounded up to a power of two)."""


class FP8Tensor(NamedTuple):
    """x ~= data * scale, one FP32 scale per block of 128 elements (or 128 x 128).

    Args:
        data: float8_e4m3fn values; contiguous.
        scale: float32, one of
            per_token: (M, ceil(K/128)) for data (M, K), MN-major (see `empty_scale`);
            per_block: ([E,] ceil(N/128), ceil(K/128)) for data ([E,] N, K), contiguous;
            per_channel: (N, R/128) for token-transposed data (N, R), MN-major; with block scales
                (ceil(N/128), R/128), which is per_block.
    """

    data: torch.Tensor
    scale: torch.Tensor


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b) for non-negative integers."""
    return -(-a // b)


def scale_ld(m: int) -> int:
    """max(4, ceil(m / 4) * 4): leading dimension, in floats, of an MN-major scale with m rows.

    TMA wants rows of whole 16-byte units.
    """
    return max(4, ceil_div(m, 4) * 4)


def empty_scale(m: int, kb: int, device: torch.device | str | None = None) -> torch.Tensor:
    """An uninitialised MN-major scale: shape (m, kb), strides (1, ceil(m / 4) * 4), float32."""
    # Strided from the start: transposing and slicing a plain tensor takes three times as long.
    ld = scale_ld(m)
    scale = torch.empty_strided((ld, kb), (1, ld), dtype=torch.float32, device=device)
    return scale if m == ld else scale[:m]


def empty_per_channel(
    n: int, capacity: int, device: torch.device | None, block: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised data (n, capacity) and its scale: per_channel, or of 128 x 128 blocks."""
    data_t = torch.empty((n, capacity), dtype=FP8_DTYPE, device=device)
    if block:
        shape = (ceil_div(n, BLOCK), capacity // BLOCK)
        return data_t, torch.empty(shape, dtype=torch.float32, device=device)
    return data_t, empty_scale(n, capacity // BLOCK, device)


def padded_capacity(rows: int, num_groups: int) -> int:
    """max(128, floor((rows + 127 * num_groups) / 128) * 128): rows that always hold every group.

    The sum over groups of ceil(m_g / 128) * 128 never exceeds it, whatever the split of `rows`.
    """
    return max(BLOCK, (rows + (BLOCK - 1) * num_groups) // BLOCK * BLOCK)
