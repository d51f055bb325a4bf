"""BF16 grouped GEMMs: against FP64 with one rounding, ragged and empty groups."""

from __future__ import annotations

import pytest
import torch

from fp8moe import testing
from fp8moe.functional import bf16

ROWS, N, K, GROUPS = 200, 200, 136, 3


@pytest.fixture
def inputs(device):
    x = torch.randn(ROWS, K, device=device).bfloat16()
    w = torch.randn(GROUPS, N, K, device=device).bfloat16()
    dy = torch.randn(ROWS, N, device=device).bfloat16()
    return x, w, dy


@pytest.mark.parametrize("kind", testing.GROUP_KINDS)
def test_against_fp64(inputs, device, kind):
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 0, kind, device)
    y, dx = bf16.grouped_linear(x, w, ends), bf16.grouped_dgrad(dy, w, ends)
    # Memory that an output is likely to get: an empty group must be written, not left.
    spoiled = [torch.full((GROUPS, N, K), float("nan"), device=device).bfloat16() for _ in range(8)]
    del spoiled
    dw = bf16.grouped_wgrad(dy, x, ends)
    start = 0
    for g, end in enumerate(ends.tolist()):
        rows = slice(start, end)
        start = end
        a, b = x[rows].double(), dy[rows].double()
        for out, ref in (
            (y[rows], a @ w[g].double().t()),
            (dx[rows], b @ w[g].double()),
            (dw[g], b.t() @ a),
        ):
            assert testing.worst_row_error(out, ref) < testing.BF16_ROW_ERROR
    assert y.dtype == dx.dtype == dw.dtype == torch.bfloat16


def test_gate_sees_a_neighbour_groups_weight(inputs, device):
    x, w, _ = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 0, "uniform", device)
    y = bf16.grouped_linear(x, w.roll(1, 0), ends)
    ref = x[: ends[0]].double() @ w[0].double().t()
    assert testing.worst_row_error(y[: ends[0]], ref) > 0.5


def test_operators_pass_opcheck():
    x = torch.randn(16, 32).bfloat16()
    w, ends = torch.randn(2, 8, 32).bfloat16(), torch.tensor([4, 16], dtype=torch.int32)
    dy = torch.randn(16, 8).bfloat16()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fp8moe.bf16_grouped_linear, (x, w, ends), test_utils=tests)
    torch.library.opcheck(torch.ops.fp8moe.bf16_grouped_dgrad, (dy, w, ends), test_utils=tests)
    torch.library.opcheck(torch.ops.fp8moe.bf16_grouped_wgrad, (dy, x, ends), test_utils=tests)
