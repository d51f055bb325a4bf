"""The first GEMM with SwiGLU in its epilogue, beside the two kernels that it replaces."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import harness
from benchmarks.layer.parts import Effort, Rows
from benchmarks.layer.workload import Shape, make_inputs
from fp8moe import quant, testing
from fp8moe.kernels import cast_permute, permute, swiglu
from fp8moe.kernels.fp8tensor import FP8Tensor
from fp8moe.kernels.gemm import m_grouped_gemm_nt
from fp8moe.kernels.gemm_swiglu import m_grouped_gemm_swiglu

FUSED, APART = "m_grouped_gemm_swiglu", "m_grouped_gemm_nt + swiglu_cast_both"


def fusion_part(shape: Shape, effort: Effort, device: torch.device) -> Rows:
    """Times of both ways, and whether their results are the same bits."""
    sizes = dict.fromkeys((shape.tokens, min(shape.tokens, 512)))
    return [row for t in sizes for row in _compare(shape._replace(tokens=t), effort, device)]


@torch.no_grad()
def _compare(shape: Shape, effort: Effort, device: torch.device) -> Rows:
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
    same = all(
        testing.same_bits(a[:used], b[:used])
        for a, b in zip(ways[APART](), ways[FUSED](), strict=True)
    )
    times = harness.time_back_to_back(ways, effort.rounds, effort.calls)
    rows: list[dict[str, Any]] = [
        {"tokens": shape.tokens, "op": op, "us": us} for op, us in times.items()
    ]
    rows[-1] |= {"x apart": times[FUSED] / times[APART], "same bits": same}
    return rows
