"""GEMMs with SwiGLU or its backward pass in the epilogue, beside the kernels that they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.layer.parts import Effort, Rows
from benchmarks.layer.workload import Shape, make_inputs
from fp8moe import quant, testing
from fp8moe.kernels import cast_permute, permute, swiglu
from fp8moe.kernels.fp8tensor import BLOCK, FP8Tensor
from fp8moe.kernels.gemm import m_grouped_gemm_nt
from fp8moe.kernels.gemm_swiglu import m_grouped_gemm_swiglu
from fp8moe.kernels.gemm_swiglu_backward import m_grouped_gemm_swiglu_backward

FUSED, APART = "m_grouped_gemm_swiglu", "m_grouped_gemm_nt + swiglu_cast_both"
BACKWARD_FUSED = "m_grouped_gemm_swiglu_backward"
BACKWARD_APART = "m_grouped_gemm_nt + swiglu_backward_cast"

Results = tuple[torch.Tensor, ...]


def fusion_part(shape: Shape, effort: Effort, device: torch.device) -> Rows:
    """Times of both ways, and whether their results are the same bits."""
    return _at_sizes(_forward, shape, effort, device)


def fusion_backward_part(shape: Shape, effort: Effort, device: torch.device) -> Rows:
    """The same for da = dy w2 and SwiGLU's backward pass."""
    return _at_sizes(_backward, shape, effort, device)


def backward_apart(
    a: FP8Tensor,
    b: FP8Tensor,
    group_ends: torch.Tensor,
    h: FP8Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> Results:
    """m_grouped_gemm_swiglu_backward in two kernels."""
    da = m_grouped_gemm_nt(a, b, group_ends)
    return swiglu.swiglu_backward_cast(*h, da, topk_weights, slot_of_row, pow2)


def _at_sizes(
    compare: Callable[[Shape, Effort, torch.device], Rows],
    shape: Shape,
    effort: Effort,
    device: torch.device,
) -> Rows:
    sizes = dict.fromkeys((shape.tokens, min(shape.tokens, 512)))
    return [row for t in sizes for row in compare(shape._replace(tokens=t), effort, device)]


@torch.no_grad()
def _forward(shape: Shape, effort: Effort, device: torch.device) -> Rows:
    inputs = make_inputs(shape, device)
    row_of_slot, slots, ends, _ = permute.route(inputs.ids, shape.experts)
    x = FP8Tensor(*cast_permute.cast_permute(inputs.x, row_of_slot, slots, True))
    w13, weights = quant.per_block(inputs.w13, pow2=True), inputs.probs.detach()
    h = m_grouped_gemm_nt(x, w13, ends)
    ways = {
        "m_grouped_gemm_nt": lambda: m_grouped_gemm_nt(x, w13, ends, out=h),
        "swiglu_cast_both": lambda: swiglu.swiglu_cast_both(h, weights, slots, True),
        APART: lambda: swiglu.swiglu_cast_both(
            m_grouped_gemm_nt(x, w13, ends), weights, slots, True
        ),
        FUSED: lambda: m_grouped_gemm_swiglu(x, w13, ends, weights, slots, True),
    }
    used = int(ends[-1])
    return _rows(ways, lambda out: [t[:used] for t in out], shape, effort)


@torch.no_grad()
def _backward(shape: Shape, effort: Effort, device: torch.device) -> Rows:
    inputs = make_inputs(shape, device)
    row_of_slot, slots, ends, _ = permute.route(inputs.ids, shape.experts)
    x, dy = (
        FP8Tensor(*cast_permute.cast_permute(t.detach(), row_of_slot, slots, True))
        for t in (inputs.x, inputs.dy)
    )
    weights = inputs.probs.detach()
    w2_t = quant.per_block(inputs.w2.detach().transpose(1, 2).contiguous(), pow2=True)
    w13 = quant.per_block(inputs.w13, pow2=True)
    h = FP8Tensor(*m_grouped_gemm_swiglu(x, w13, ends, weights, slots, True)[2:])
    del x, w13
    da = m_grouped_gemm_nt(dy, w2_t, ends)
    ways = {
        "m_grouped_gemm_nt": lambda: m_grouped_gemm_nt(dy, w2_t, ends, out=da),
        "swiglu_backward_cast": lambda: swiglu.swiglu_backward_cast(*h, da, weights, slots, True),
        BACKWARD_APART: lambda: backward_apart(dy, w2_t, ends, h, weights, slots, True),
        BACKWARD_FUSED: lambda: m_grouped_gemm_swiglu_backward(
            dy, w2_t, ends, h, weights, slots, True
        ),
    }
    used = int(ends[-1])

    def written(out: Results) -> list[torch.Tensor]:
        rows, columns = out[:2], out[2:]
        return [
            *(t[:used] for t in rows),
            *(t[:, : used if t.shape[1] == len(slots) else used // BLOCK] for t in columns),
        ]

    return _rows(ways, written, shape, effort)


def _rows(
    ways: dict[str, Callable[[], Results]],
    written: Callable[[Results], list[torch.Tensor]],
    shape: Shape,
    effort: Effort,
) -> Rows:
    """Times of all ways; the last two are the same work. written: what of their results counts."""
    *_, apart, fused = ways
    same = all(
        testing.same_bits(a, b)
        for a, b in zip(written(ways[apart]()), written(ways[fused]()), strict=True)
    )
    times = harness.time_back_to_back(ways, effort.rounds, effort.calls)
    rows: list[dict[str, Any]] = [
        {"tokens": shape.tokens, "op": op, "us": us} for op, us in times.items()
    ]
    rows[-1] |= {"x apart": times[fused] / times[apart], "same bits": same}
    return rows
