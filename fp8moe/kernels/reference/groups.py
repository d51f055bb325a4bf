"""Group offsets on the host: the reference's view of `group_ends`."""

from __future__ import annotations

import torch

from fp8moe.kernels import status
from fp8moe.kernels.fp8tensor import BLOCK, ceil_div


def bounds(group_ends: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """[(start, end)] of every group, checked.

    Raises:
        ValueError: an end is smaller than the one before it, or larger than `rows`.
    """
    ends = group_ends.tolist()
    start = 0
    out = []
    for i, end in enumerate(ends):
        if end < start:
            raise ValueError(status.message(status.Code.GROUP_ENDS_DECREASE, i, end, start))
        if end > rows:
            raise ValueError(status.message(status.Code.GROUP_ENDS_EXCEED_ROWS, i, end, rows))
        out.append((start, end))
        start = end
    return out


def check_aligned(group_ends: torch.Tensor) -> None:
    """Raise ValueError unless every group ends at a multiple of 128."""
    for i, end in enumerate(group_ends.tolist()):
        if end % BLOCK:
            raise ValueError(status.message(status.Code.GROUP_END_UNALIGNED, i, end, BLOCK))


def sizes(group_sizes: torch.Tensor, rows: int) -> list[int]:
    """The size of every group of a masked GEMM, checked.

    Raises:
        ValueError: a size is negative or larger than `rows`.
    """
    out = group_sizes.tolist()
    for i, size in enumerate(out):
        if not 0 <= size <= rows:
            raise ValueError(status.message(status.Code.GROUP_SIZE_OUT_OF_RANGE, i, size, rows))
    return out


def align(n: int) -> int:
    """n rounded up to a multiple of 128."""
    return ceil_div(n, BLOCK) * BLOCK


def padded_bounds(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """[(start, end)] of every group once each group is padded to a multiple of 128."""
    out = []
    start = 0
    for lo, hi in spans:
        end = start + align(hi - lo)
        out.append((start, end))
        start = end
    return out
