"""SwiGLU with the routing weight folded in, fused with the FP8 casts on both sides of it."""

from __future__ import annotations

import functools

import torch

from fp8moe.kernels import jit, launch, reference, registry
from fp8moe.kernels.arguments import (
    check_aligned,
    check_multiple,
    check_scale,
    check_slot_of_row,
    check_tensor,
)
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, ceil_div, empty_per_channel, empty_scale

Pair = tuple[torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Backward = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]

FORWARD_THREADS = 256
FORWARD_ROWS = 64
BACKWARD_THREADS = 512
BACKWARD_PANEL = 8
"""Row blocks whose column blocks are interleaved in the grid."""

BACKWARD_SMEM = 3 * BLOCK * BLOCK * 2
"""g, u and da of a 128 x 128 tile in bfloat16; dg, du and aw replace them."""


def _check(
    h: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    check_slot_of_row(slot_of_row, h.device)
    check_tensor("h", h, (slot_of_row.shape[0], 2 * columns), (dtype,))
    check_multiple("h: I", columns, BLOCK)
    check_tensor("topk_weights", topk_weights, ("T", "K"), (torch.float32,), h.device)


def _forward_spec(pow2: bool, with_h: bool) -> jit.KernelSpec:
    constants = (("POW2", int(pow2)), ("WITH_H", int(with_h)))
    return jit.KernelSpec("swiglu.cuh", "swiglu_cast", constants)


def _backward_spec(pow2: bool, h_fp8: bool) -> jit.KernelSpec:
    constants = (("POW2", int(pow2)), ("H_FP8", int(h_fp8)))
    return jit.KernelSpec("swiglu_backward.cuh", "swiglu_backward_cast", constants)


@functools.cache
def _forward_kernel(pow2: bool, with_h: bool) -> launch.Kernel:
    return jit.load(_forward_spec(pow2, with_h))


@functools.cache
def _backward_kernel(pow2: bool, h_fp8: bool) -> launch.Kernel:
    return jit.load(_backward_spec(pow2, h_fp8))


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    return [
        spec(pow2, h_fp8)
        for spec in (_forward_spec, _backward_spec)
        for pow2 in (False, True)
        for h_fp8 in (False, True)
    ]


def _forward_cuda(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    out = _forward_fake(h, topk_weights, slot_of_row, pow2)
    _launch_forward(h, topk_weights, slot_of_row, pow2, out, None, None)
    return out


def _both_cuda(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Four:
    out = _both_fake(h, topk_weights, slot_of_row, pow2)
    _launch_forward(h, topk_weights, slot_of_row, pow2, out[:2], out[2:], None)
    return out


def _launch_forward(
    h: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    out: Pair,
    h_out: Pair | None,
    aw_rounded: torch.Tensor | None,
) -> None:
    """Writes the casts to `out` and `h_out`, and the activation itself to `aw_rounded` if given."""
    data, scale = out
    capacity, columns = data.shape
    if columns == 0:
        return
    check_aligned(h=h, slot_of_row=slot_of_row)
    _forward_kernel(pow2, h_out is not None)(
        (columns // BLOCK, capacity // FORWARD_ROWS),
        FORWARD_THREADS,
        (
            h,
            topk_weights,
            slot_of_row,
            columns,
            data,
            scale,
            scale.stride(1),
            h_out[0] if h_out else None,
            h_out[1] if h_out else None,
            h_out[1].stride(1) if h_out else 0,
            aw_rounded,
        ),
    )


def _forward_fake(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    capacity, columns = h.shape[0], h.shape[1] // 2
    return (
        h.new_empty((capacity, columns), dtype=FP8_DTYPE),
        empty_scale(capacity, ceil_div(columns, BLOCK), h.device),
    )


def _both_fake(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Four:
    capacity, columns = h.shape
    return (
        *_forward_fake(h, topk_weights, slot_of_row, pow2),
        h.new_empty((capacity, columns), dtype=FP8_DTYPE),
        empty_scale(capacity, ceil_div(columns, BLOCK), h.device),
    )


def _backward_cuda(
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Backward:
    return _launch_backward(h, h_scale, da, topk_weights, slot_of_row, pow2, None, None)


def _launch_backward(
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    dh_rounded: torch.Tensor | None,
    aw_rounded: torch.Tensor | None,
) -> Backward:
    """`swiglu_backward_cast`; also writes the rounded dh (Rcap, 2I) and aw (Rcap, I) if given."""
    out = _backward_fake(h, h_scale, da, topk_weights, slot_of_row, pow2)
    dh, dh_scale, dh_t, dh_t_scale, aw_t, aw_t_scale, dprob_partial = out
    capacity, columns = da.shape
    if columns == 0:
        return out
    check_aligned(h=h, da=da, slot_of_row=slot_of_row)
    _backward_kernel(pow2, h_scale is not None)(
        (BACKWARD_PANEL, columns // BLOCK, ceil_div(capacity // BLOCK, BACKWARD_PANEL)),
        BACKWARD_THREADS,
        (
            h,
            h_scale,
            h_scale.stride(1) if h_scale is not None else 0,
            da,
            topk_weights,
            slot_of_row,
            columns,
            capacity,
            dh,
            dh_scale,
            dh_scale.stride(1),
            dh_t,
            dh_t_scale,
            dh_t_scale.stride(1),
            aw_t,
            aw_t_scale,
            dprob_partial,
            dh_rounded,
            aw_rounded,
        ),
        smem=BACKWARD_SMEM,
    )
    return out


def _backward_fake(
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Backward:
    rows, columns = da.shape
    return backward_outputs(rows, columns, h.device)


def backward_outputs(rows: int, columns: int, device: torch.device) -> Backward:
    """What `swiglu_backward_cast` returns for da (rows, columns), uninitialised."""
    blocks = ceil_div(columns, BLOCK)
    return (
        torch.empty((rows, 2 * columns), dtype=FP8_DTYPE, device=device),
        empty_scale(rows, ceil_div(2 * columns, BLOCK), device),
        *empty_per_channel(2 * columns, rows, device),
        *empty_per_channel(columns, rows, device, block=True),
        torch.empty((blocks, rows), dtype=torch.float32, device=device),
    )


_swiglu_cast = registry.define_op(
    "swiglu_cast(Tensor h, Tensor topk_weights, Tensor slot_of_row, bool pow2) -> (Tensor, Tensor)",
    cpu=reference.swiglu_cast,
    cuda=_forward_cuda,
    fake=_forward_fake,
)
_swiglu_cast_both = registry.define_op(
    "swiglu_cast_both(Tensor h, Tensor topk_weights, Tensor slot_of_row, bool pow2)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.swiglu_cast_both,
    cuda=_both_cuda,
    fake=_both_fake,
)
_swiglu_backward_cast = registry.define_op(
    "swiglu_backward_cast(Tensor h, Tensor? h_scale, Tensor da, Tensor topk_weights,"
    " Tensor slot_of_row, bool pow2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.swiglu_backward_cast,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


def swiglu_cast(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    """cast_per_token(aw), aw[r, i] = bf16(p[r] * silu(g[r, i]) * u[r, i]), h = [g | u].

    FP32 arithmetic; p[r] is the routing weight of the row's slot, so that the combine is a sum.

    Args:
        h: (Rcap, 2I) bfloat16, contiguous, I a multiple of 128.
        topk_weights: (T, K) float32, contiguous.
        slot_of_row: (Rcap,) int32 from `route`.
        pow2: round scales up to powers of two.

    Returns: data (Rcap, I) float8_e4m3fn, scale (Rcap, I/128) MN-major; padding has zero data and
        the floor scale.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    _check(h, topk_weights, slot_of_row, h.shape[-1] // 2)
    return _swiglu_cast(h, topk_weights, slot_of_row, pow2)


def swiglu_cast_both(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Four:
    """swiglu_cast(h) and cast_per_token(h), reading h once.

    Args: as for `swiglu_cast`.

    Returns: data (Rcap, I), scale (Rcap, I/128); h (Rcap, 2I) float8_e4m3fn with its scale
        (Rcap, 2I/128). Padding has zero data and the floor scale.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    _check(h, topk_weights, slot_of_row, h.shape[-1] // 2)
    return _swiglu_cast_both(h, topk_weights, slot_of_row, pow2)


def swiglu_backward_cast(
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Backward:
    """dh = [p * da * u * s * (1 + g * (1 - s)) | p * da * silu(g)], s = sigmoid(g), cast both ways.

    FP32 arithmetic; dh and aw are rounded to bfloat16 before the casts.

    Args:
        h: (Rcap, 2I) contiguous, I a multiple of 128: the input of `swiglu_cast` in bfloat16, or
            what `swiglu_cast_both` made of it, float8_e4m3fn.
        h_scale: (Rcap, 2I/128) float32, MN-major, for h in FP8; None for bfloat16.
        da: (Rcap, I) bfloat16, contiguous, gradient of the unweighted activation's consumer.
        topk_weights: (T, K) float32, contiguous.
        slot_of_row: (Rcap,) int32 from `route`.
        pow2: round scales up to powers of two.

    Returns:
        dh (Rcap, 2I), dh_scale (Rcap, 2I/128): per_token.
        dh_t (2I, Rcap), dh_t_scale (2I, Rcap/128): per_channel.
        aw_t (I, Rcap), aw_t_scale (I/128, Rcap/128) contiguous: the forward activation transposed,
            per_block. It does not depend on da.
        dprob_partial (I/128, Rcap) float32: sum of da * silu(g) * u over each 128 columns.
        Padding rows are zero.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_tensor("da", da, ("Rcap", "I"), (torch.bfloat16,), h.device)
    dtype = torch.bfloat16 if h_scale is None else FP8_DTYPE
    _check(h, topk_weights, slot_of_row, da.shape[1], dtype)
    if h_scale is not None:
        check_scale("h_scale", h_scale, h)
    check_tensor("da", da, (slot_of_row.shape[0], da.shape[1]), (torch.bfloat16,))
    return _swiglu_backward_cast(h, h_scale, da, topk_weights, slot_of_row, pow2)
