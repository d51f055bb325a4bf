"""Rows of high precision cast per token on their way to expert order, where alone they are written.

Bit for bit `cast_per_token` followed by the permutation of its result. With BF16 input each is one
pass over the rows; other dtypes run the two steps.
"""

from __future__ import annotations

import functools

import torch

from fp8moe.kernels import cast, jit, launch, permute, reference, registry
from fp8moe.kernels.arguments import (
    check_aligned,
    check_multiple,
    check_slot_of_row,
    check_tensor,
    check_topk,
)
from fp8moe.kernels.fp8tensor import BLOCK, ceil_div
from fp8moe.kernels.permute import Four, Pair

THREADS = 256
WARP_COLUMNS = 1024
"""What a warp of cast_permute takes of a token's row."""
SCALES_BLOCKS = 8
"""Scales of each of 128 rows that a CTA of permute_scales moves, four a thread."""


def _rows_spec(pow2: bool) -> jit.KernelSpec:
    return jit.KernelSpec("cast_permute.cuh", "cast_permute", (("POW2", int(pow2)),))


def _scales_spec() -> jit.KernelSpec:
    return jit.KernelSpec("cast_permute.cuh", "permute_scales", (("POW2", 0),))


def _channel_spec(pow2: bool, block: bool, with_rows: bool) -> jit.KernelSpec:
    constants = permute.to_channel_constants(pow2, block, with_rows)
    return jit.KernelSpec("cast_transpose.cuh", "cast_permute_to_channel", constants)


@functools.cache
def _rows_kernel(pow2: bool) -> launch.Kernel:
    return jit.load(_rows_spec(pow2))


@functools.cache
def _scales_kernel() -> launch.Kernel:
    return jit.load(_scales_spec())


@functools.cache
def _channel_kernel(pow2: bool, block: bool, with_rows: bool) -> launch.Kernel:
    return jit.load(_channel_spec(pow2, block, with_rows))


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    specs = [*(_rows_spec(pow2) for pow2 in (False, True)), _scales_spec()]
    forms = permute.TO_CHANNEL_FORMS
    return specs + [_channel_spec(pow2, *form) for pow2 in (False, True) for form in forms]


def _rows_cuda(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    data, scale = permute.rows_like(x, slot_of_row)
    launch_rows(x, row_of_slot, slot_of_row, pow2, data, scale)
    return data, scale


def launch_rows(
    x: torch.Tensor,
    row_of_slot: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    data: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """`cast_permute` into data (Rcap, H) and scale (Rcap, H/128), which may be parts of rows."""
    tokens, columns = x.shape
    if x.numel() == 0:
        return
    if x.dtype != torch.bfloat16:
        x8, x_scale = cast._cast_per_token_cuda(x, pow2)
        permute.launch_permute(x8, data, x_scale, scale, row_of_slot, slot_of_row)
        return
    check_aligned(x=x)
    topk, blocks = row_of_slot.shape[1], columns // BLOCK
    mn_major = scale.stride(0) == 1
    # A row a token, of whole 16 bytes: permute_scales loads so many at once.
    written = scale.new_empty((tokens, ceil_div(blocks, 4) * 4)) if mn_major else scale
    _rows_kernel(pow2)(
        ceil_div(tokens, THREADS // 32) * ceil_div(columns, WARP_COLUMNS),
        THREADS,
        (
            x,
            row_of_slot,
            tokens,
            topk,
            columns,
            data,
            permute.pitch(data),
            *permute.steps(written),
            int(mn_major),
        ),
    )
    if mn_major:
        _scales_kernel()(
            (slot_of_row.shape[0] // BLOCK, ceil_div(blocks, SCALES_BLOCKS)),
            THREADS,
            (
                written,
                written.stride(0),
                slot_of_row,
                *permute.divisor(max(1, topk)),
                blocks,
                scale,
                scale.stride(1),
            ),
        )


def _rows_fake(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    return permute.rows_like(x, slot_of_row)


def _launch_channel(
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    topk: int,
    pow2: bool,
    block: bool,
    rows_out: Pair | None,
    channel_out: Pair,
) -> None:
    columns, capacity = x.shape[1], slot_of_row.shape[0]
    if columns == 0:
        return
    check_aligned(x=x, slot_of_row=slot_of_row)
    multiplier, shift = permute.divisor(topk)
    data_t, scale_t = channel_out
    _channel_kernel(pow2, block, rows_out is not None)(
        (capacity // BLOCK, columns // BLOCK),
        THREADS,
        (
            x,
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
            permute.scale_pitch(scale_t, block),
        ),
    )


def _channel_cuda(
    x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool, block: bool
) -> Pair:
    if x.dtype != torch.bfloat16:
        x8 = cast._cast_per_token_cuda(x, pow2)
        return permute._permute_fp8_to_channel_cuda(*x8, slot_of_row, topk, pow2, block)
    out = permute.channel_like(x, slot_of_row, block)
    _launch_channel(x, slot_of_row, topk, pow2, block, None, out)
    return out


def _channel_fake(
    x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool, block: bool
) -> Pair:
    return permute.channel_like(x, slot_of_row, block)


def _both_cuda(x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool) -> Four:
    if x.dtype != torch.bfloat16:
        x8 = cast._cast_per_token_cuda(x, pow2)
        return permute._permute_fp8_both_cuda(*x8, slot_of_row, topk, pow2)
    out = _both_fake(x, slot_of_row, topk, pow2)
    _launch_channel(x, slot_of_row, topk, pow2, False, out[:2], out[2:])
    return out


def _both_fake(x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool) -> Four:
    return *permute.rows_like(x, slot_of_row), *permute.channel_like(x, slot_of_row, False)


_cast_permute = registry.define_op(
    "cast_permute(Tensor x, Tensor row_of_slot, Tensor slot_of_row, bool pow2) -> (Tensor, Tensor)",
    cpu=reference.cast_permute,
    cuda=_rows_cuda,
    fake=_rows_fake,
)
_cast_permute_to_channel = registry.define_op(
    "cast_permute_to_channel(Tensor x, Tensor slot_of_row, int topk, bool pow2, bool block)"
    " -> (Tensor, Tensor)",
    cpu=reference.cast_permute_to_channel,
    cuda=_channel_cuda,
    fake=_channel_fake,
)
_cast_permute_both = registry.define_op(
    "cast_permute_both(Tensor x, Tensor slot_of_row, int topk, bool pow2)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.cast_permute_both,
    cuda=_both_cuda,
    fake=_both_fake,
)


def check(x: torch.Tensor, slot_of_row: torch.Tensor) -> None:
    """Raise ValueError unless these are tokens that can be cast and a routing map."""
    check_tensor("x", x, ("T", "H"), tuple(cast.INPUTS))
    check_multiple("x: H", x.shape[1], BLOCK)
    check_slot_of_row(slot_of_row, x.device)


def cast_permute(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    """permute_fp8(cast_per_token(x)); padding rows are undefined.

    Args:
        x: (T, H) bfloat16, float16 or float32, contiguous, H a multiple of 128.
        row_of_slot: (T, K) int32 from `route`.
        slot_of_row: (Rcap,) int32 from `route`.
        pow2: round scales up to powers of two.

    Returns: data (Rcap, H) float8_e4m3fn and scale (Rcap, H/128) float32, MN-major.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check(x, slot_of_row)
    check_tensor("row_of_slot", row_of_slot, (x.shape[0], "K"), (torch.int32,), x.device)
    return _cast_permute(x, row_of_slot, slot_of_row, pow2)


def cast_permute_to_channel(
    x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool, block: bool
) -> Pair:
    """permute_fp8_to_channel(cast_per_token(x)).

    Args:
        x: (T, H) bfloat16, float16 or float32, contiguous, H a multiple of 128.
        slot_of_row: (Rcap,) int32 from `route`.
        topk: K, slots per token.
        pow2: round scales up to powers of two.
        block: one scale for 128 rows x 128 channels instead of 128 rows of one channel.

    Returns: data_t (H, Rcap), zero in padding, and
        scale_t (H, Rcap/128), MN-major: per_channel; or
        scale_t (H/128, Rcap/128), contiguous: per_block, of the transposed matrix.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check(x, slot_of_row)
    check_topk(topk)
    return _cast_permute_to_channel(x, slot_of_row, topk, pow2, block)


def cast_permute_both(x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool) -> Four:
    """permute_fp8_both(cast_per_token(x)): columns as with block=False.

    Args: as for `cast_permute_to_channel`.

    Returns: data (Rcap, H), scale (Rcap, H/128), data_t (H, Rcap), scale_t (H, Rcap/128).

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check(x, slot_of_row)
    check_topk(topk)
    return _cast_permute_both(x, slot_of_row, topk, pow2)
