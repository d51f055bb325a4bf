"""Routing maps, and rows moved between token order and expert order.

Slot i = t * K + k is token t's k-th choice. In expert order every expert's rows start at a multiple
of 128; `slot_of_row` says which slot a row belongs to: -1 is padding inside a group, -2 lies past
the last group. Rows past the last group are never written.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from fp8moe.kernels import gather, jit, launch, reference, registry, routing
from fp8moe.kernels.arguments import (
    check_aligned,
    check_fp8_rows,
    check_maps,
    check_multiple,
    check_rows,
    check_slot_of_row,
    check_topk,
)
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, ceil_div, empty_per_channel, empty_scale
from fp8moe.kernels.gather import gather_slots, gather_sum
from fp8moe.kernels.routing import route, route_kept

__all__ = [
    "gather_slots",
    "gather_sum",
    "kernel_specs",
    "permute_fp8",
    "permute_fp8_both",
    "permute_fp8_to_channel",
    "permute_rows",
    "route",
    "route_kept",
]

Pair = tuple[torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

THREADS = 256
PERMUTE_WARPS = THREADS // 32
PERMUTE_RUN_BYTES = 2048
"""What a warp of permute_rows moves of a token's row."""


# ---- kernels -----------------------------------------------------------------------------------


@functools.cache
def divisor(value: int) -> tuple[ctypes.c_uint32, int]:
    """(multiplier, shift) with n // value == (n * multiplier >> 32) >> shift for 0 <= n < 2**31.

    A multiplier of 0 stands for division by 1.
    """
    if value == 1:
        return ctypes.c_uint32(0), 0
    shift = (value - 1).bit_length() - 1
    return ctypes.c_uint32(ceil_div(1 << (32 + shift), value)), shift


def _permute_spec(with_scale: bool) -> jit.KernelSpec:
    return jit.KernelSpec("permute.cuh", "permute_rows", (("WITH_SCALE", int(with_scale)),))


@functools.cache
def _permute_kernel(with_scale: bool) -> launch.Kernel:
    return jit.load(_permute_spec(with_scale))


TO_CHANNEL_FORMS = ((False, False), (False, True), (True, False))
"""(block, with_rows) of the conversions to channels: rows come with the gradients' columns only."""


def to_channel_constants(pow2: bool, block: bool, with_rows: bool) -> tuple[tuple[str, int], ...]:
    """What transpose.cuh and cast_transpose.cuh are built for."""
    return ("POW2", int(pow2)), ("BLOCK", int(block)), ("WITH_ROWS", int(with_rows))


def _to_channel_spec(pow2: bool, block: bool, with_rows: bool) -> jit.KernelSpec:
    constants = to_channel_constants(pow2, block, with_rows)
    return jit.KernelSpec("transpose.cuh", "permute_to_channel", constants)


@functools.cache
def _to_channel_kernel(pow2: bool, block: bool, with_rows: bool) -> launch.Kernel:
    return jit.load(_to_channel_spec(pow2, block, with_rows))


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    specs = routing.kernel_specs() + gather.kernel_specs()
    specs += [_permute_spec(with_scale) for with_scale in (False, True)]
    specs += [_to_channel_spec(pow2, *form) for pow2 in (False, True) for form in TO_CHANNEL_FORMS]
    return specs


def pitch(rows: torch.Tensor) -> int:
    """Bytes from one row to the next."""
    return rows.stride(0) * rows.element_size()


def steps(scale: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """What kernels are told of scales that need not be MN-major."""
    return (None, 0, 0) if scale is None else (scale, scale.stride(0), scale.stride(1))


def launch_permute(
    source: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    row_of_slot: torch.Tensor,
    slot_of_row: torch.Tensor,
) -> None:
    """`permute_rows` from source (T, H) to out (Rcap, H); with scales, `permute_fp8`."""
    rows, columns = out.shape
    tokens, topk = row_of_slot.shape
    row_bytes = columns * out.element_size()
    if row_bytes == 0:
        return
    check_aligned(source=source)
    row_blocks = rows // BLOCK
    multiplier, shift = divisor(max(1, topk))
    _permute_kernel(scale is not None)(
        (row_blocks + ceil_div(tokens, PERMUTE_WARPS), ceil_div(row_bytes, PERMUTE_RUN_BYTES)),
        THREADS,
        (
            source,
            pitch(source),
            out,
            pitch(out),
            row_of_slot,
            slot_of_row,
            tokens,
            topk,
            row_bytes,
            row_blocks,
            multiplier,
            shift,
            *steps(scale),
            *steps(scale_out),
        ),
    )


def _permute_rows_cuda(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> torch.Tensor:
    out = _permute_rows_fake(x, row_of_slot, slot_of_row)
    launch_permute(x, out, None, None, row_of_slot, slot_of_row)
    return out


def _permute_rows_fake(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((slot_of_row.shape[0], x.shape[1]))


def _permute_fp8_cuda(
    data: torch.Tensor, scale: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> Pair:
    out, scale_out = _permute_fp8_fake(data, scale, row_of_slot, slot_of_row)
    launch_permute(data, out, scale, scale_out, row_of_slot, slot_of_row)
    return out, scale_out


def _permute_fp8_fake(
    data: torch.Tensor, scale: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> Pair:
    return rows_like(data, slot_of_row)


def rows_like(x: torch.Tensor, slot_of_row: torch.Tensor) -> Pair:
    """Uninitialised per_token FP8 data and scale: the rows of x in expert order."""
    capacity, columns = slot_of_row.shape[0], x.shape[1]
    return (
        x.new_empty((capacity, columns), dtype=FP8_DTYPE),
        empty_scale(capacity, ceil_div(columns, BLOCK), x.device),
    )


def channel_like(x: torch.Tensor, slot_of_row: torch.Tensor, block: bool) -> Pair:
    """Uninitialised FP8 data of the same rows, transposed, and its scale: per_channel or blocks."""
    return empty_per_channel(x.shape[1], slot_of_row.shape[0], x.device, block)


def scale_pitch(scale_t: torch.Tensor, block: bool) -> int:
    """Elements from one row of the scales of `channel_like` in memory to the next."""
    return scale_t.stride(0 if block else 1)


def _launch_to_channel(
    data: torch.Tensor,
    scale: torch.Tensor,
    slot_of_row: torch.Tensor,
    topk: int,
    pow2: bool,
    block: bool,
    rows_out: Pair | None,
    channel_out: Pair,
) -> None:
    columns = data.shape[1]
    capacity = slot_of_row.shape[0]
    if columns == 0:
        return
    check_aligned(data=data, slot_of_row=slot_of_row)
    kernel = _to_channel_kernel(pow2, block, rows_out is not None)
    multiplier, shift = divisor(topk)
    data_t, scale_t = channel_out
    kernel(
        (capacity // BLOCK, ceil_div(columns, 2 * BLOCK)),
        THREADS,
        (
            data,
            pitch(data),
            *steps(scale),
            slot_of_row,
            multiplier,
            shift,
            columns,
            capacity,
            rows_out[0] if rows_out else None,
            rows_out[1] if rows_out else None,
            rows_out[1].stride(1) if rows_out else 0,
            data_t,
            scale_t,
            scale_pitch(scale_t, block),
        ),
    )


def _permute_fp8_to_channel_cuda(
    data: torch.Tensor,
    scale: torch.Tensor,
    slot_of_row: torch.Tensor,
    topk: int,
    pow2: bool,
    block: bool,
) -> Pair:
    out = channel_like(data, slot_of_row, block)
    _launch_to_channel(data, scale, slot_of_row, topk, pow2, block, None, out)
    return out


def _permute_fp8_to_channel_fake(
    data: torch.Tensor,
    scale: torch.Tensor,
    slot_of_row: torch.Tensor,
    topk: int,
    pow2: bool,
    block: bool,
) -> Pair:
    return channel_like(data, slot_of_row, block)


def _permute_fp8_both_cuda(
    data: torch.Tensor, scale: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool
) -> Four:
    rows = rows_like(data, slot_of_row)
    channel = channel_like(data, slot_of_row, False)
    _launch_to_channel(data, scale, slot_of_row, topk, pow2, False, rows, channel)
    return *rows, *channel


def _permute_fp8_both_fake(
    data: torch.Tensor, scale: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool
) -> Four:
    return *rows_like(data, slot_of_row), *channel_like(data, slot_of_row, False)


# ---- operators ---------------------------------------------------------------------------------

_permute_rows = registry.define_op(
    "permute_rows(Tensor x, Tensor row_of_slot, Tensor slot_of_row) -> Tensor",
    cpu=reference.permute_rows,
    cuda=_permute_rows_cuda,
    fake=_permute_rows_fake,
)
_permute_fp8 = registry.define_op(
    "permute_fp8(Tensor data, Tensor scale, Tensor row_of_slot, Tensor slot_of_row)"
    " -> (Tensor, Tensor)",
    cpu=reference.permute_fp8,
    cuda=_permute_fp8_cuda,
    fake=_permute_fp8_fake,
)
_permute_fp8_to_channel = registry.define_op(
    "permute_fp8_to_channel(Tensor data, Tensor scale, Tensor slot_of_row, int topk, bool pow2,"
    " bool block) -> (Tensor, Tensor)",
    cpu=reference.permute_fp8_to_channel,
    cuda=_permute_fp8_to_channel_cuda,
    fake=_permute_fp8_to_channel_fake,
)
_permute_fp8_both = registry.define_op(
    "permute_fp8_both(Tensor data, Tensor scale, Tensor slot_of_row, int topk, bool pow2)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.permute_fp8_both,
    cuda=_permute_fp8_both_cuda,
    fake=_permute_fp8_both_fake,
)


def permute_rows(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> torch.Tensor:
    """out[row_of_slot[t, k]] = x[t]; zero in padding, undefined past the last group.

    Args:
        x: (T, H) bfloat16, rows contiguous, H a multiple of 8.
        row_of_slot: (T, K) int32 from `route`.
        slot_of_row: (Rcap,) int32 from `route`.

    Returns: (Rcap, H) bfloat16.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_rows("x", x, (torch.bfloat16,))
    check_multiple("x: H", x.shape[1], 8)
    check_maps(x, row_of_slot, slot_of_row)
    return _permute_rows(x, row_of_slot, slot_of_row)


def permute_fp8(
    data: torch.Tensor, scale: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> Pair:
    """data_out[row_of_slot[t, k]] = data[t], scale likewise: bytes move, nothing is rounded.

    Args:
        data: (T, H) float8_e4m3fn, rows contiguous, H a multiple of 128.
        scale: (T, H/128) float32, per_token, with any strides.
        row_of_slot: (T, K) int32 from `route`.
        slot_of_row: (Rcap,) int32 from `route`.

    Returns: data (Rcap, H) and scale (Rcap, H/128), MN-major. Padding: zero data, scale 2**-56.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_fp8_rows(data, scale)
    check_maps(data, row_of_slot, slot_of_row)
    return _permute_fp8(data, scale, row_of_slot, slot_of_row)


def permute_fp8_to_channel(
    data: torch.Tensor,
    scale: torch.Tensor,
    slot_of_row: torch.Tensor,
    topk: int,
    pow2: bool,
    block: bool,
) -> Pair:
    """data_t[h, r] = e4m3(x[slot_of_row[r] // topk, h] / scale_t[h, r // 128]), x = data * scale.

    With power-of-two scales on both sides only values that become subnormal are rounded again.

    With `block` the scale of 128 rows x 128 channels, scale_t[h // 128, r // 128], is the largest
    of its rows' scales (with pow2 rounded up to a power of two, and at least the scale of zeros):
    what the block's own values would have got, because a scale grows with the maximum it is made
    from. Values are multiplied out in FP32 and then by 448 / (448 * scale_t).

    Args:
        data: (T, H) float8_e4m3fn, rows contiguous, H a multiple of 128.
        scale: (T, H/128) float32, per_token, with any strides.
        slot_of_row: (Rcap,) int32 from `route`.
        topk: K, slots per token.
        pow2: round the new scales up to powers of two.
        block: one scale for 128 rows x 128 channels instead of 128 rows of one channel.

    Returns: data_t (H, Rcap), zero in padding, and
        scale_t (H, Rcap/128), MN-major: per_channel; or
        scale_t (H/128, Rcap/128), contiguous: per_block, of the transposed matrix.
        A row with scale NaN makes what shares its scale NaN, scale and data.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_fp8_rows(data, scale)
    check_slot_of_row(slot_of_row, data.device)
    check_topk(topk)
    return _permute_fp8_to_channel(data, scale, slot_of_row, topk, pow2, block)


def permute_fp8_both(
    data: torch.Tensor, scale: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool
) -> Four:
    """permute_fp8 and permute_fp8_to_channel(block=False) of the same input, which is read once.

    Args: as for `permute_fp8_to_channel`.

    Returns: data (Rcap, H), scale (Rcap, H/128), data_t (H, Rcap), scale_t (H, Rcap/128).

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_fp8_rows(data, scale)
    check_slot_of_row(slot_of_row, data.device)
    check_topk(topk)
    return _permute_fp8_both(data, scale, slot_of_row, topk, pow2)
