"""The whole GEMM kernel on the CPU: barriers, boxes, swizzles, descriptors, scales, tiles, stores.

See tensor_core.h for what this cannot show: anything that needs things to happen at the same time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8moe import quant, testing
from fp8moe.kernels import gemm, gemm_swiglu, swiglu
from fp8moe.kernels.fp8tensor import BLOCK, ceil_div
from fp8moe.kernels.heuristics import Grouping, Output, Problem, Tile

from .conftest import plant
from .test_emulated import assert_same

Start = Any


class Case:
    """Operands of groups of any size, padding rows of x full of NaN, and a routing map."""

    def __init__(self, sizes: list[int], width: int, k: int) -> None:
        self.used = sum(sizes)
        rows = ceil_div(self.used + 5, BLOCK) * BLOCK
        x = torch.randn(rows, k) * torch.randint(-4, 5, (rows, 1)).exp2()
        # Blocks of w with scales of their own.
        w = torch.randn(len(sizes), 2 * width, k) * torch.rand(len(sizes), 2 * width, 1)
        slots = torch.randperm(rows).int()
        slots[torch.rand(rows) < 0.1] = -1
        slots[self.used :] = -1
        slots[ceil_div(self.used, BLOCK) * BLOCK :] = -2
        self.a = quant.per_token(x.bfloat16(), pow2=True)
        self.b = quant.per_block(w.bfloat16(), pow2=False)
        self.ends = torch.tensor(sizes).cumsum(0).int()
        self.weights, self.slots = torch.rand(rows, 1), slots
        self.exact = testing.oracle_m_grouped_gemm_nt(self.a, self.b, self.ends)
        self.a.data.view(torch.uint8)[slots < 0] = 0x7F

    def gemm(self, tile: Tile) -> torch.Tensor:
        (m, k), (e, n, _) = self.a.data.shape, self.b.data.shape
        h = torch.empty((m, n), dtype=torch.bfloat16)
        p = Problem(Grouping.M_GROUPED, Output.BF16, m, n, k, e)
        gemm._launch(p, *self.a, *self.b, self.ends, h, (tile, 2))
        return h

    def fused(self, pow2: bool) -> tuple[torch.Tensor, ...]:
        return gemm_swiglu._cuda(*self.a, *self.b, self.ends, self.weights, self.slots, pow2)

    def apart(self, pow2: bool) -> tuple[torch.Tensor, ...]:
        return swiglu._both_cuda(self.gemm(gemm_swiglu.TILE), self.weights, self.slots, pow2)

    def check(self, fused: tuple[torch.Tensor, ...], apart: tuple[torch.Tensor, ...]) -> None:
        for got, wanted in zip(fused, apart, strict=True):
            assert_same(got[: self.used], wanted[: self.used])
            rest = got.t()[:, self.used :].contiguous().view(torch.uint8)
            assert (rest == 0xA5).all(), "wrote past the last group"


@pytest.mark.parametrize("tile", [Tile(128, 256), Tile(128, 192), Tile(64, 64)], ids=str)
def test_gemm(emulated: Start, tile: Tile) -> None:
    case = Case([40, 0, 131], 128, 400)
    words = emulated(gemm, swiglu)
    h = case.gemm(tile)
    real = case.slots[: case.used] >= 0
    error = testing.worst_row_error(h[: case.used][real], case.exact[real])
    assert error < testing.BF16_ROW_ERROR
    assert (h[case.used :].view(torch.uint8) == 0xA5).all() and not words.any()


def _weight_gradient(output: Output, tile: Tile, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """(result, exact result) of groups of 131, 0 and 200 rows, added to ones for Output.ADD."""
    sizes = [131, 0, 200]
    ends = torch.tensor(sizes).cumsum(0).int()
    dy, x = torch.randn(sum(sizes), n).bfloat16(), torch.randn(sum(sizes), k).bfloat16()
    a = quant.per_channel(dy, ends, pow2=False)
    b = quant.per_channel(x, ends, pow2=False, block=True)
    dtype = torch.bfloat16 if output == Output.BF16 else torch.float32
    out = torch.ones((3, n, k), dtype=dtype)
    exact = testing.oracle_k_grouped_gemm(a, b, ends) + (output == Output.ADD)
    p = Problem(Grouping.K_GROUPED, output, n, k, a.data.shape[1], len(sizes))
    gemm._launch(p, *a, *b, ends, out, (tile, 2))
    return out, exact


@pytest.mark.parametrize("output", list(Output), ids=lambda o: o.name)
@pytest.mark.parametrize("tile", [Tile(128, 192), Tile(192, 128), Tile(128, 256)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(200, 264), (130, 208)], ids=["wide scales", "any scales"])
def test_weight_gradient(emulated: Start, output: Output, tile: Tile, n: int, k: int) -> None:
    words = emulated(gemm)
    out, exact = _weight_gradient(output, tile, n, k)
    gate = testing.BF16_ROW_ERROR if output == Output.BF16 else testing.FP32_ROW_ERROR
    for group, wanted in zip(out, exact, strict=True):
        assert testing.worst_row_error(group, wanted) < gate
    assert not words.any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("far ? i + 2 : i", "i"),
        ("r % 2 != turn", "r % 4 != turn"),
        ("lane % 2 * 8", "0"),
        ("cp_async_16(dst + i * 4, scale + first + i", "cp_async_16(dst + i * 4, scale + i"),
        ("GROUPING == K_GROUPED ? 0 :", ""),
        ("++source_b", "source_b += 0"),
    ],
    ids=["columns", "turns", "pairs", "scales of A", "block of B", "scales of B"],
)
def test_a_planted_error_of_the_weight_gradient_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    emulated(gemm)
    plant(monkeypatch, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        out, exact = _weight_gradient(Output.F32, Tile(128, 192), 200, 264)
        for group, wanted in zip(out, exact, strict=True):
            assert testing.worst_row_error(group, wanted) < testing.FP32_ROW_ERROR


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
@pytest.mark.parametrize(
    ("sizes", "width", "k"),
    [([40, 0, 131], 256, 400), ([0, 1, 128, 0], 128, 1152), ([0, 0], 128, 128)],
    ids=str,
)
def test_gemm_with_swiglu_has_the_bits_of_both_kernels(
    emulated: Start, sizes: list[int], width: int, k: int, pow2: bool
) -> None:
    case = Case(sizes, width, k)
    data, scale = case.a
    data[2] = 0
    scale[3] = float("inf")
    scale[5] *= 2.0**-60
    scale[7] *= 2.0**60
    words = emulated(gemm, gemm_swiglu, swiglu)
    emulated.readable += [case.weights, case.slots]  # their addresses are in a struct
    case.check(case.fused(pow2), case.apart(pow2))
    assert not words.any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("t.b_row + n / 2", "t.b_row + n / 4"),
        ("lane * (n_blocks / 2)", "lane"),
        ("a + A_BYTES + B_BYTES / 2", "a + A_BYTES"),
        ("full(stage), STAGE_BYTES", "full(stage), STAGE_BYTES - 16384"),
        ("mbarrier_init(empty(stage), CONSUMER_WARPS)", "mbarrier_init(empty(stage), 1)"),
        ("0x7632), __byte_perm(v.z", "0x5410), __byte_perm(v.z"),
        ("lane % 16, c + lane / 16)", "lane % 16, c + lane / 8 % 2)"),
        ("first_row + lane % 16) : kPad", "first_row + lane % 8) : kPad"),
        ("ordered, r < rows);", "ordered, true);"),
        ("g[i] = u[i] = 0", "g[i] = 0"),
        ("block_scale<kPow2>(act_maxima << 16)", "block_scale<kPow2>(act_maxima)"),
        ("which == 1 ? half_n / 128 : 0", "0"),
    ],
    ids=(
        "rows of up,scale of up,second box,bytes,arrivals,"
        "order,panel,slot,group end,padding,scale,block"
    ).split(","),
)
def test_a_planted_error_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    case = Case([40, 131], 256, 768)
    emulated(gemm, gemm_swiglu, swiglu)
    emulated.readable += [case.weights, case.slots]
    apart = case.apart(True)
    plant(monkeypatch, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        case.check(case.fused(True), apart)
