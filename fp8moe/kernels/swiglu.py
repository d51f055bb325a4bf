"""SwiGLU with the routing weight folded in, fused with the FP8 casts on both sides of it."""

from __future__ import annotations

import functools

import torch

from fp8moe.kernels import jit, launch, reference, registry
from fp8moe.kernels.arguments import (
    check_aligned,
    check_multiple,
    check_slot_of_row,
    check_tensor,
)
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, ceil_div, empty_scale

Pair = tuple[torch.Tensor, torch.Tensor]
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
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, columns: int
) -> None:
    check_slot_of_row(slot_of_row, h.device)
    check_tensor("h", h, (slot_of_row.shape[0], 2 * columns), (torch.bfloat16,))
    check_multiple("h: I", columns, BLOCK)
    check_tensor("topk_weights", topk_weights, (None, None), (torch.float32,), h.device)


def _forward_spec(pow2: bool) -> jit.KernelSpec:
    return jit.KernelSpec("swiglu.cuh", "swiglu_cast", (("POW2", int(pow2)),))


def _backward_spec(pow2: bool) -> jit.KernelSpec:
    return jit.KernelSpec("swiglu_backward.cuh", "swiglu_backward_cast", (("POW2", int(pow2)),))


@functools.cache
def _forward_kernel(pow2: bool) -> launch.Kernel:
    return jit.load(_forward_spec(pow2))


@functools.cache
def _backward_kernel(pow2: bool) -> launch.Kernel:
    return jit.load(_backward_spec(pow2))


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    return [spec(pow2) for spec in (_forward_spec, _backward_spec) for pow2 in (False, True)]


def _forward_cuda(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    return _launch_forward(h, topk_weights, slot_of_row, pow2, None)


def _launch_forward(
    h: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    aw_rounded: torch.Tensor | None,
) -> Pair:
    """`swiglu_cast`; also writes the rounded activation to `aw_rounded` (Rcap, I) if given."""
    data, scale = _forward_fake(h, topk_weights, slot_of_row, pow2)
    capacity, columns = data.shape
    if columns == 0:
        return data, scale
    check_aligned(h=h, slot_of_row=slot_of_row)
    _forward_kernel(pow2)(
        (columns // BLOCK, capacity // FORWARD_ROWS),
        FORWARD_THREADS,
        (h, topk_weights, slot_of_row, columns, data, scale, scale.stride(1), aw_rounded),
    )
    return data, scale


def _forward_fake(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> Pair:
    capacity, columns = h.shape[0], h.shape[1] // 2
    return (
        h.new_empty((capacity, columns), dtype=FP8_DTYPE),
        empty_scale(capacity, ceil_div(columns, BLOCK), h.device),
    )


def _backward_cuda(
    h: torch.Tensor,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Backward:
    return _launch_backward(h, da, topk_weights, slot_of_row, pow2, None, None)


def _launch_backward(
    h: torch.Tensor,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    dh_rounded: torch.Tensor | None,
    aw_rounded: torch.Tensor | None,
) -> Backward:
    """`swiglu_backward_cast`; also writes the rounded dh (Rcap, 2I) and aw (Rcap, I) if given."""
    out = _backward_fake(h, da, topk_weights, slot_of_row, pow2)
    dh, dh_scale, dh_t, dh_t_scale, aw_t, aw_t_scale, dprob_partial = out
    capacity, columns = da.shape
    if columns == 0:
        return out
    check_aligned(h=h, da=da, slot_of_row=slot_of_row)
    _backward_kernel(pow2)(
        (BACKWARD_PANEL, columns // BLOCK, ceil_div(capacity // BLOCK, BACKWARD_PANEL)),
        BACKWARD_THREADS,
        (
            h,
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
            aw_t_scale.stride(1),
            dprob_partial,
            dh_rounded,
            aw_rounded,
        ),
        smem=BACKWARD_SMEM,
    )
    return out


def _backward_fake(
    h: torch.Tensor,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Backward:
    capacity, columns = da.shape
    blocks = ceil_div(columns, BLOCK)
    device = h.device
    return (
        h.new_empty((capacity, 2 * columns), dtype=FP8_DTYPE),
        empty_scale(capacity, ceil_div(2 * columns, BLOCK), device),
        h.new_empty((2 * columns, capacity), dtype=FP8_DTYPE),
        empty_scale(2 * columns, capacity // BLOCK, device),
        h.new_empty((columns, capacity), dtype=FP8_DTYPE),
        empty_scale(columns, capacity // BLOCK, device),
        h.new_empty((blocks, capacity), dtype=torch.float32),
    )


_swiglu_cast = registry.define_op(
    "swiglu_cast(Tensor h, Tensor topk_weights, Tensor slot_of_row, bool pow2) -> (Tensor, Tensor)",
    cpu=reference.swiglu_cast,
    cuda=_forward_cuda,
    fake=_forward_fake,
)
_swiglu_backward_cast = registry.define_op(
    "swiglu_backward_cast(Tensor h, Tensor da, Tensor topk_weights, Tensor slot_of_row, bool pow2)"
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


def swiglu_backward_cast(
    h: torch.Tensor,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Backward:
    """dh = [p * da * u * s * (1 + g * (1 - s)) | p * da * silu(g)], s = sigmoid(g), cast both ways.

    FP32 arithmetic; dh and aw are rounded to bfloat16 before the casts.

    Args:
        h: (Rcap, 2I) bfloat16, contiguous, the input of `swiglu_cast`, I a multiple of 128.
        da: (Rcap, I) bfloat16, contiguous, gradient of the unweighted activation's consumer.
        topk_weights: (T, K) float32, contiguous.
        slot_of_row: (Rcap,) int32 from `route`.
        pow2: round scales up to powers of two.

    Returns:
        dh (Rcap, 2I), dh_scale (Rcap, 2I/128): per_token.
        dh_t (2I, Rcap), dh_t_scale (2I, Rcap/128): per_channel.
        aw_t (I, Rcap), aw_t_scale (I, Rcap/128): the forward activation, per_channel.
        dprob_partial (I/128, Rcap) float32: sum of da * silu(g) * u over each 128 columns.
        Padding rows are zero.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_tensor("da", da, (None, None), (torch.bfloat16,), h.device)
    _check(h, topk_weights, slot_of_row, da.shape[1])
    check_tensor("da", da, (slot_of_row.shape[0], da.shape[1]), (torch.bfloat16,))
    return _swiglu_backward_cast(h, da, topk_weights, slot_of_row, pow2)
