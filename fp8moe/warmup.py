"""Which kernels an expert layer of given sizes uses, so that they can be compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterable

from fp8moe.kernels import (
    cast,
    cast_permute,
    dispatch,
    gemm,
    gemm_swiglu,
    gemm_swiglu_backward,
    heuristics,
    permute,
    swiglu,
)
from fp8moe.kernels.fp8tensor import BLOCK, padded_capacity
from fp8moe.kernels.heuristics import Grouping, Output, Problem
from fp8moe.kernels.jit import KernelSpec
from fp8moe.shapes import LayerShape

H100_SMS = 132
TOKENS = tuple(2**i for i in range(7, 17))
"""Tokens per micro-batch assumed when none are given: the powers of two from 128 to 65536."""


def layer_problems(shape: LayerShape, tokens: int) -> set[Problem]:
    """The GEMMs of forward and backward for a micro-batch of ``tokens``, whatever the routing."""
    h, i, e = shape.hidden, shape.intermediate, shape.experts
    rows = tokens * shape.topk
    capacity = padded_capacity(rows, e)
    problems = set()
    for n, k in ((2 * i, h), (h, i), (i, h), (h, 2 * i)):  # fprop of w13, w2, then dgrad
        for m in (capacity, rows):  # swiglu_experts pads its groups, grouped_linear does not
            problems.add(Problem(Grouping.M_GROUPED, Output.BF16, m, n, k, e))
    for m, n in ((2 * i, h), (h, i)):  # wgrad: into BF16 or FP32, or added to main_grad
        for output in Output:
            problems.add(Problem(Grouping.K_GROUPED, output, m, n, capacity, e))
    return problems


def all_specs() -> list[KernelSpec]:
    """Every kernel configuration that is shipped."""
    modules = (
        gemm,
        gemm_swiglu,
        gemm_swiglu_backward,
        cast,
        cast_permute,
        permute,
        swiglu,
        dispatch,
    )
    return [spec for module in modules for spec in module.kernel_specs()]


def layer_specs(
    shape: LayerShape, tokens: Iterable[int] = TOKENS, num_sms: int = H100_SMS
) -> list[KernelSpec]:
    """The kernels that layers of ``shape`` use on a GPU with ``num_sms`` multiprocessors.

    Kernels take their sizes at run time, so this is a part of ``all_specs``: the tiles that the
    heuristics choose for these sizes, and all casts, permutations and activations.

    Args:
        shape: the expert layer.
        tokens: token counts per micro-batch.
        num_sms: 132 on H100 SXM and H200, 114 on H100 PCIe, 78 on H20.
    """
    specs: dict[KernelSpec, None] = {}
    for count in tokens:
        for problem in sorted(layer_problems(shape, count), key=repr):
            tile, _ = heuristics.choose(problem, num_sms)
            spec = gemm.spec(problem.grouping, problem.output, tile, problem.groups)
            specs[spec] = None
    if shape.hidden % BLOCK == 0 and shape.intermediate % BLOCK == 0:  # the fused path
        for pow2 in (False, True):
            specs[gemm_swiglu.spec(pow2, shape.experts)] = None
            specs[gemm_swiglu_backward.spec(pow2)] = None
    for module in (cast, cast_permute, permute, swiglu, dispatch):
        specs.update(dict.fromkeys(module.kernel_specs()))
    return list(specs)
