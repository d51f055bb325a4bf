"""SwiGLU's backward pass and its casts in the epilogue of da = dy w2: da is never stored."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch

from fp8moe.kernels import gemm, heuristics, jit, launch, operands, reference, registry, status
from fp8moe.kernels.arguments import (
    check_aligned,
    check_multiple,
    check_scale,
    check_slot_of_row,
    check_tensor,
)
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor
from fp8moe.kernels.heuristics import Grouping, Tile
from fp8moe.kernels.swiglu import Backward, backward_outputs

TILE = Tile(128, 256)
"""Two blocks of 128 x 128 of da."""

STAGES = 3
"""One less than the BF16 output has with few groups: the staging takes 71 KiB instead of 32."""

# The order of the operands' rows in shared memory, for which see csrc/epilogue_swiglu_backward.cuh:
# of 16 rows of A the even ones first; row 8 i + 2 q + e of 64 of B is row 16 q + 2 i + e.
_ORDER_A = ((8, 2), (2, 1))
_ORDER_B = ((2, 1), (4, 16), (8, 2))

_OUTPUT_SWIGLU_BACKWARD = 4  # as in csrc/scheduler.cuh

# struct Staging of csrc/epilogue_swiglu_backward.cuh: h and values of 16 rows for each of the
# eight warps, two transposed buffers, column maxima, inverse scales, maxima of the activation.
_ROWS_BYTES = 2 * 16 * BLOCK + 4 * 4 * 16
_STAGING_BYTES = 8 * _ROWS_BYTES + 2 * BLOCK * BLOCK + 8 * 4 * BLOCK + 2 * 4 * BLOCK + 8 * 4


def _shared_memory(groups: int) -> int:
    """Bytes of dynamic shared memory, as laid out in csrc/gemm.cuh."""
    return STAGES * TILE.stage_bytes + _STAGING_BYTES + heuristics.table_bytes(groups)


def spec(pow2: bool) -> jit.KernelSpec:
    """The compiled configuration, for any number of groups."""
    return jit.KernelSpec(
        "gemm.cuh",
        "gemm",
        (
            ("GROUPING", int(Grouping.M_GROUPED)),
            ("OUTPUT", _OUTPUT_SWIGLU_BACKWARD),
            *TILE.constants,
            ("STAGES", STAGES),
            ("ASYNC_STORE", 0),
            ("POW2", int(pow2)),
        ),
        hold_operands=True,
    )


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    return [spec(pow2) for pow2 in (False, True)]


@functools.cache
def _kernel(pow2: bool) -> launch.Kernel:
    return jit.load(spec(pow2))


def _cuda(*args: Any) -> Backward:
    out = _fake(*args)
    _launch(*args, out)  # type: ignore[call-arg]  # mypy takes args to be no shorter than all
    return out


def _launch(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    h: torch.Tensor,
    h_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    out: Backward,
) -> None:
    m, k = a.shape
    groups, n, _ = b.shape
    if m == 0:
        return
    check_aligned(h=h)
    dh, dh_scale, dh_t, dh_t_scale, aw_t, aw_t_scale, dprob_partial = out
    sms = gemm.num_sms(a.get_device())
    band, grid = heuristics.m_grouped_walk(TILE, m, n, k, groups, sms)
    map_a = gemm.operand_map(a, TILE.block_m, _ORDER_A)
    # struct Destination of csrc/epilogue_swiglu_backward.cuh.
    destination = struct.pack(
        "@11P3i4x",
        h.data_ptr(),
        h_scale.data_ptr(),
        topk_weights.data_ptr(),
        slot_of_row.data_ptr(),
        dh.data_ptr(),
        dh_scale.data_ptr(),
        dh_t.data_ptr(),
        dh_t_scale.data_ptr(),
        aw_t.data_ptr(),
        aw_t_scale.data_ptr(),
        dprob_partial.data_ptr(),
        gemm.block_stride(h_scale),
        dh_scale.stride(1),
        dh_t_scale.stride(1),
    )
    _kernel(pow2)(
        grid,
        128 * (TILE.consumers + 1),
        [
            map_a,
            gemm.operand_map(b, TILE.block_n, _ORDER_B),
            map_a,  # of a BF16 output; the kernel does not look at it
            a_scale,
            b_scale,
            destination,
            group_ends,
            status.pointer(a.device),
            m,
            n,
            k,
            groups,
            band,
            m,
            gemm.block_stride(a_scale),
            b_scale.shape[-1],
        ],
        smem=_shared_memory(groups),
    )


def _fake(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, *_: Any) -> Backward:
    return backward_outputs(a.shape[0], b.shape[1], a.device)


_m_grouped_gemm_swiglu_backward = registry.define_op(
    "m_grouped_gemm_swiglu_backward(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale,"
    " Tensor group_ends, Tensor h, Tensor h_scale, Tensor topk_weights, Tensor slot_of_row,"
    " bool pow2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.m_grouped_gemm_swiglu_backward,
    cuda=_cuda,
    fake=_fake,
)


@operands.once_per_layout
def _check(a8, a_scale, b8, b_scale, group_ends, h8, h_scale, topk_weights, slot_of_row) -> None:
    operands.check_data("a", a8, 2)
    operands.check_data("b", b8, 3)
    m, (e, n, _), device = a8.shape[0], b8.shape, a8.device
    check_multiple("b.data: rows of an expert (I)", n, BLOCK)
    operands.check_forward(FP8Tensor(a8, a_scale), FP8Tensor(b8, b_scale))
    operands.check_groups("group_ends", group_ends, e, device)
    check_slot_of_row(slot_of_row, device)
    check_tensor("slot_of_row", slot_of_row, (m,), (torch.int32,))
    check_tensor("h.data", h8, (m, 2 * n), (FP8_DTYPE,), device)
    check_scale("h.scale", h_scale, h8)
    check_tensor("topk_weights", topk_weights, ("T", "K"), (torch.float32,), device)


def m_grouped_gemm_swiglu_backward(
    a: FP8Tensor,
    b: FP8Tensor,
    group_ends: torch.Tensor,
    h: FP8Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Backward:
    """swiglu_backward_cast(h, da), da[m, n] = sum_k A[m, k] B[g(m), n, k] in BF16, bit for bit.

    Args:
        a: data (Rcap, K) float8_e4m3fn, scale (Rcap, ceil(K/128)) MN-major: dy in expert order.
        b: data (E, I, K), w2 transposed, I a multiple of 128; scale (E, I/128, ceil(K/128)).
        group_ends: (E,) int32 on the device, non-decreasing multiples of 128, at most Rcap, as
            `route` makes them: a group's padding is part of it.
        h: data (Rcap, 2I), scale (Rcap, 2I/128) MN-major, as `swiglu_cast_both` or
            `m_grouped_gemm_swiglu` makes them.
        topk_weights: (T, K) float32, contiguous.
        slot_of_row: (Rcap,) int32 from `route`; rows with a negative one are padding.
        pow2: round scales up to powers of two.

    Returns: as `swiglu_backward_cast`. Padding rows are zero; what belongs to rows from
        ``group_ends[-1]`` on is not written.

    Raises: ValueError naming the argument, what was expected and what came. Bad ``group_ends`` are
        found on the device and raised by a later operator or ``fp8moe.check_errors``.
    """
    _check(*operands.parts(a, b), group_ends, *h, topk_weights, slot_of_row)
    operands.check_addresses(a, b)
    return _m_grouped_gemm_swiglu_backward(*a, *b, group_ends, *h, topk_weights, slot_of_row, pow2)
