"""Checks of the GEMM operands: errors name the argument, what was expected and what came."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fp8moe.kernels import heuristics
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div

_MAX_LAYOUTS = 4096


def once_per_layout(check: Callable[..., None]) -> Callable[..., None]:
    """`check`, skipped for tensors of a layout that has passed it.

    A training step has the same layouts again and again, and to look for what is wrong with them
    takes the host as long as two launches.

    Args:
        check: looks at shapes, strides, dtypes and devices of its positional arguments, tensors or
            None, and at the values of its keywords. Addresses are not its business.
    """
    passed: set[tuple[Any, ...]] = set()

    @functools.wraps(check)
    def once(*tensors: torch.Tensor | None, **others: Any) -> None:
        if torch.compiler.is_compiling():  # sizes may be symbols
            return check(*tensors, **others)
        key = (
            *[t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
            *others.items(),
        )
        try:
            if key in passed:
                return
        except TypeError:  # a tracer's symbols have no hash
            return check(*tensors, **others)
        check(*tensors, **others)
        if len(passed) >= _MAX_LAYOUTS:
            passed.clear()
        passed.add(key)

    return once


def parts(a: FP8Tensor, b: FP8Tensor, suffix: str = "") -> tuple[torch.Tensor, ...]:
    """Data and scale of both. Raises: ValueError for what is not an FP8Tensor."""
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, FP8Tensor):
            raise ValueError(f"{name}{suffix}: expected an FP8Tensor, got {type(t).__name__}")
    return (*a, *b)


def check_addresses(
    a: FP8Tensor, b: FP8Tensor, out: torch.Tensor | None = None, suffix: str = ""
) -> None:
    """Raise ValueError unless TMA can read the operands and write `out`: 16-byte aligned."""
    if torch.compiler.is_compiling():  # a traced tensor has no address yet
        return
    addresses = a.data.data_ptr(), b.data.data_ptr(), 0 if out is None else out.data_ptr()
    if not (addresses[0] | addresses[1] | addresses[2]) % 16:
        return
    names = f"a{suffix}.data", f"b{suffix}.data", "out"
    for name, address in zip(names, addresses, strict=True):
        if address % 16:
            raise ValueError(f"{name}: expected a 16-byte aligned address, got {address:#x}")


def check_data(name: str, t: torch.Tensor, dims: int) -> None:
    """Raise ValueError unless `t` is contiguous E4M3 data of K % 16 == 0."""
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


def check_scale_shape(name: str, t: FP8Tensor, shape: tuple[int, ...]) -> None:
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
    check_scale_shape(name, t, shape)
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
    check_scale_shape(name, t, (*groups, ceil_div(n, BLOCK), ceil_div(k, BLOCK)))
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
    out: torch.Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless a GEMM can write to `out`, which is contiguous; None will do."""
    if out is None:
        return
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {shape}, got {tuple(out.shape)}")
    if out.dtype not in dtypes:
        raise ValueError(f"out: expected dtype {' or '.join(map(str, dtypes))}, got {out.dtype}")
    if out.device != device:
        raise ValueError(f"out: expected device {device}, got {out.device}")
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")


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


def check_forward(a: FP8Tensor, b: FP8Tensor) -> int:
    """Raise ValueError unless these are operands of ``A B^T`` with 1x128 and 128x128 scales.

    Returns: N.
    """
    check_pair(a, b)
    n = b.data.shape[-2]
    check_n(n)
    check_row_scale("a", a)
    check_block_scale("b", b)
    return n


@once_per_layout
def check_gemm_nt(a8, a_scale, b8, b_scale, out) -> None:
    """Raise ValueError unless `gemm_nt` can take these."""
    check_data("a", a8, 2)
    check_data("b", b8, 2)
    n = check_forward(FP8Tensor(a8, a_scale), FP8Tensor(b8, b_scale))
    check_out(out, (a8.shape[0], n), (torch.bfloat16,), a8.device)


@once_per_layout
def check_m_grouped(a8, a_scale, b8, b_scale, group_ends, out) -> None:
    """Raise ValueError unless `m_grouped_gemm_nt` can take these."""
    check_data("a", a8, 2)
    check_data("b", b8, 3)
    n = check_forward(FP8Tensor(a8, a_scale), FP8Tensor(b8, b_scale))
    check_groups("group_ends", group_ends, b8.shape[0], a8.device)
    check_out(out, (a8.shape[0], n), (torch.bfloat16,), a8.device)


@once_per_layout
def check_masked(a8, a_scale, b8, b_scale, group_sizes, out) -> None:
    """Raise ValueError unless `m_grouped_gemm_nt_masked` can take these."""
    check_data("a", a8, 3)
    check_data("b", b8, 3)
    e, m, _ = a8.shape
    if b8.shape[0] != e:
        raise ValueError(f"b.data: expected {e} groups as in a, got {b8.shape[0]}")
    n = check_forward(FP8Tensor(a8, a_scale), FP8Tensor(b8, b_scale))
    check_groups("group_sizes", group_sizes, e, a8.device)
    check_out(out, (e, m, n), (torch.bfloat16,), a8.device)


@once_per_layout
def check_k_grouped(a8, a_scale, b8, b_scale, group_ends, out, *, accumulate: bool) -> None:
    """Raise ValueError unless `k_grouped_gemm` can take these."""
    check_data("a_t", a8, 2)
    check_data("b_t", b8, 2)
    n, rows = a8.shape
    k = b8.shape[0]
    if b8.shape[1] != rows:
        raise ValueError(f"b_t.data: expected {rows} columns as in a_t, got {b8.shape[1]}")
    if rows % BLOCK or rows == 0:
        raise ValueError(f"a_t.data: expected a positive multiple of {BLOCK} columns, got {rows}")
    if k % 8 or k == 0:
        raise ValueError(f"b_t.data: expected a positive multiple of 8 rows, got {k}")
    check_row_scale("a_t", FP8Tensor(a8, a_scale))
    check_block_scale("b_t", FP8Tensor(b8, b_scale))
    if b8.device != a8.device:
        raise ValueError(f"b_t.data: expected device {a8.device}, got {b8.device}")
    check_groups("group_ends", group_ends, None, a8.device)
    if accumulate and out is None:
        raise ValueError("out: expected a float32 tensor to accumulate into, got None")
    dtypes = (torch.float32,) if accumulate else (torch.float32, torch.bfloat16)
    check_out(out, (group_ends.shape[0], n, k), dtypes, a8.device)
