"""SwiGLU and its casts in the epilogue of the GEMM that makes their input: h is never stored."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch

from fp8moe.kernels import gemm, heuristics, jit, launch, operands, reference, registry, status
from fp8moe.kernels.arguments import check_multiple, check_slot_of_row, check_tensor
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, empty_scale
from fp8moe.kernels.heuristics import Grouping, Tile

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

TILE = Tile(128, 256)
"""128 rows of 128 columns of the gate and the same of up."""

_OUTPUT_SWIGLU = 3  # as in csrc/scheduler.cuh


def spec(pow2: bool, groups: int) -> jit.KernelSpec:
    """The compiled configuration for this many groups."""
    return jit.KernelSpec(
        "gemm.cuh",
        "gemm",
        (
            ("GROUPING", int(Grouping.M_GROUPED)),
            ("OUTPUT", _OUTPUT_SWIGLU),
            *TILE.constants,
            # Two panels of staging a warp, as for BF16, hence the same stages and shared memory.
            ("STAGES", TILE.stages(groups)),
            ("ASYNC_STORE", 0),
            ("POW2", int(pow2)),
        ),
        hold_operands=True,
    )


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    return [spec(pow2, n) for pow2 in (False, True) for n in (1, heuristics.MAX_GROUPS)]


@functools.cache
def _kernel(pow2: bool, groups: int) -> launch.Kernel:
    return jit.load(spec(pow2, groups))


def _cuda(*args: Any) -> Four:
    out = _fake(*args)
    _launch(*args, out)  # type: ignore[call-arg]  # mypy takes args to be no shorter than all
    return out


def _launch(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    out: Four,
) -> None:
    m, k = a.shape
    groups, n, _ = b.shape
    if m == 0:
        return
    act, act_scale, h, h_scale = out
    sms = gemm.num_sms(a.get_device())
    band, grid = heuristics.m_grouped_walk(TILE, m, n, k, groups, sms)
    map_a = gemm.operand_map(a, TILE.block_m)
    # struct Destination of csrc/epilogue_swiglu.cuh.
    destination = struct.pack(
        "@PPPPPPi4x",
        act.data_ptr(),
        act_scale.data_ptr(),
        h.data_ptr(),
        h_scale.data_ptr(),
        topk_weights.data_ptr(),
        slot_of_row.data_ptr(),
        act_scale.stride(1),
    )
    _kernel(pow2, groups)(
        grid,
        128 * (TILE.consumers + 1),
        [
            map_a,
            gemm.operand_map(b, TILE.block_n // 2),
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
        smem=TILE.shared_memory(groups),
    )


def _fake(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, *_: Any) -> Four:
    rows, n = a.shape[0], b.shape[1]
    return (
        a.new_empty((rows, n // 2), dtype=FP8_DTYPE),
        empty_scale(rows, n // 2 // BLOCK, a.device),
        a.new_empty((rows, n), dtype=FP8_DTYPE),
        empty_scale(rows, n // BLOCK, a.device),
    )


_m_grouped_gemm_swiglu = registry.define_op(
    "m_grouped_gemm_swiglu(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor group_ends,"
    " Tensor topk_weights, Tensor slot_of_row, bool pow2) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.m_grouped_gemm_swiglu,
    cuda=_cuda,
    fake=_fake,
)


@operands.once_per_layout
def _check(a8, a_scale, b8, b_scale, group_ends, topk_weights, slot_of_row) -> None:
    operands.check_data("a", a8, 2)
    operands.check_data("b", b8, 3)
    m, e, device = a8.shape[0], b8.shape[0], a8.device
    check_multiple("b.data: rows of an expert (2I)", b8.shape[1], 2 * BLOCK)
    operands.check_forward(FP8Tensor(a8, a_scale), FP8Tensor(b8, b_scale))
    operands.check_groups("group_ends", group_ends, e, device)
    check_slot_of_row(slot_of_row, device)
    check_tensor("slot_of_row", slot_of_row, (m,), (torch.int32,))
    check_tensor("topk_weights", topk_weights, ("T", "K"), (torch.float32,), device)


def m_grouped_gemm_swiglu(
    a: FP8Tensor,
    b: FP8Tensor,
    group_ends: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Four:
    """swiglu_cast_both(h), h[m, n] = sum_k A[m, k] B[g(m), n, k] rounded to BF16, bit for bit.

    Args:
        a: data (Rcap, K) float8_e4m3fn, scale (Rcap, ceil(K/128)) MN-major: rows in expert order.
        b: data (E, 2I, K), gate rows then up rows, I a multiple of 128; scale
            (E, 2I/128, ceil(K/128)).
        group_ends: (E,) int32 on the device, non-decreasing, at most Rcap. Groups of any size.
        topk_weights: (T, K) float32, contiguous.
        slot_of_row: (Rcap,) int32 from `route`; rows with a negative one are padding.
        pow2: round scales up to powers of two.

    Returns: the activation (Rcap, I) and its scale (Rcap, I/128) MN-major; h (Rcap, 2I)
        float8_e4m3fn and its scale (Rcap, 2I/128). Padding has zero data and the floor scale; rows
        from ``group_ends[-1]`` on are not written.

    Raises: ValueError naming the argument, what was expected and what came. Bad ``group_ends`` are
        found on the device and raised by a later operator or ``fp8moe.check_errors``.
    """
    _check(*operands.parts(a, b), group_ends, topk_weights, slot_of_row)
    operands.check_addresses(a, b)
    return _m_grouped_gemm_swiglu(*a, *b, group_ends, topk_weights, slot_of_row, pow2)
