"""Checks of the GEMM operands: errors name the argument, what was expected and what came."""

from __future__ import annotations

import torch

from fp8moe.kernels import heuristics
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div


def check_data(name: str, t: torch.Tensor, dims: int) -> None:
    """Raise ValueError unless `t` is aligned, contiguous E4M3 data of K % 16 == 0."""
    if t.dtype != FP8_DTYPE:
        raise ValueError(f"{name}.data: expected dtype {FP8_DTYPE}, got {t.dtype}")
    if t.dim() != dims:
        raise ValueError(f"{name}.data: expected {dims} dimensions, got shape {tuple(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(
            f"{name}.data: expected a contiguous tensor, got shape {tuple(t.shape)} with strides "
            f"{t.stride()}"
        )
    if t.shape[-1] % 16 or t.shape[-1] == 0:
        raise ValueError(
            f"{name}.data: expected K to be a positive multiple of 16, got K = {t.shape[-1]}"
        )
    # A traced tensor has no address yet.
    if not torch.compiler.is_compiling() and t.data_ptr() % 16:
        raise ValueError(f"{name}.data: expected a 16-byte aligned pointer, got {t.data_ptr():#x}")


def check_scale(name: str, t: FP8Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless t.scale is float32 of this shape beside its data."""
    if t.scale.dtype != torch.float32:
        raise ValueError(f"{name}.scale: expected dtype torch.float32, got {t.scale.dtype}")
    if tuple(t.scale.shape) != shape:
        raise ValueError(
            f"{name}.scale: expected {shape} for a {tuple(t.data.shape)}, "
            f"got {tuple(t.scale.shape)}"
        )
    if t.scale.device != t.data.device:
        raise ValueError(f"{name}.scale: expected device {t.data.device}, got {t.scale.device}")


def check_row_scale(name: str, t: FP8Tensor) -> None:
    """Raise ValueError unless t has 1 x 128 scales, MN-major: rows are neighbours in memory."""
    shape = (*t.data.shape[:-1], ceil_div(t.data.shape[-1], BLOCK))
    check_scale(name, t, shape)
    rows = t.data.numel() // max(1, t.data.shape[-1])
    stride, size = t.scale.stride(), t.scale.shape
    ok = size[-2] <= 1 or stride[-2] == 1
    ok = ok and (size[-1] <= 1 or stride[-1] >= rows)
    if len(shape) == 3:
        ok = ok and (size[0] <= 1 or stride[0] == size[1])
    if not ok:
        raise ValueError(
            f"{name}.scale: expected MN-major strides (rows contiguous, as quant.per_token makes "
            f"them), got shape {tuple(size)} with strides {stride}"
        )


def check_block_scale(name: str, t: FP8Tensor) -> None:
    """Raise ValueError unless t has contiguous 128 x 128 scales."""
    *groups, n, k = t.data.shape
    check_scale(name, t, (*groups, ceil_div(n, BLOCK), ceil_div(k, BLOCK)))
    if not t.scale.is_contiguous():
        raise ValueError(f"{name}.scale: expected a contiguous tensor, got {t.scale.stride()}")


def check_groups(name: str, groups: torch.Tensor, count: int | None, device: torch.device) -> None:
    """Raise ValueError unless `groups` is (count,) int32 on `device`; count None: any number."""
    if groups.dtype != torch.int32 or groups.dim() != 1 or not groups.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous 1D int32 tensor, got {groups.dtype} of shape "
            f"{tuple(groups.shape)}"
        )
    if count is not None and groups.shape[0] != count:
        raise ValueError(f"{name}: expected {count} groups (experts of b), got {groups.shape[0]}")
    if not 1 <= groups.shape[0] <= heuristics.MAX_GROUPS:
        raise ValueError(
            f"{name}: expected 1 to {heuristics.MAX_GROUPS} groups, got {groups.shape[0]}"
        )
    if groups.device != device:
        raise ValueError(f"{name}: expected device {device}, got {groups.device}")


def check_out(
    out: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError unless a GEMM can write to `out`, contiguous and aligned."""
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {shape}, got {tuple(out.shape)}")
    if out.dtype not in dtypes:
        raise ValueError(f"out: expected dtype {' or '.join(map(str, dtypes))}, got {out.dtype}")
    if out.device != device:
        raise ValueError(f"out: expected device {device}, got {out.device}")
    address = 0 if torch.compiler.is_compiling() else out.data_ptr()
    if not out.is_contiguous() or address % 16:
        raise ValueError(
            f"out: expected a contiguous, 16-byte aligned tensor, got strides {out.stride()} at "
            f"{address:#x}"
        )


def check_pair(a: FP8Tensor, b: FP8Tensor) -> None:
    """Raise ValueError unless both operands are on one device and have the same K."""
    if b.data.device != a.data.device:
        raise ValueError(f"b.data: expected device {a.data.device}, got {b.data.device}")
    if b.data.shape[-1] != a.data.shape[-1]:
        raise ValueError(f"b.data: expected K = {a.data.shape[-1]} as in a, got {b.data.shape[-1]}")


def check_n(n: int) -> None:
    """Raise ValueError unless N is a positive multiple of 8, 16 bytes of BF16 output."""
    if n % 8 or n == 0:
        raise ValueError(f"b.data: expected N to be a positive multiple of 8, got N = {n}")
