"""SwiGLU's backward pass in the epilogue of its GEMM, on the CPU: the bits of the two kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fp8moe import quant
from fp8moe.kernels import gemm, gemm_swiglu_backward, swiglu
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div, empty_scale
from fp8moe.kernels.heuristics import Grouping, Output, Problem

from .conftest import plant
from .test_emulated import assert_same

Start = Any
NAN_BYTE = 0x7F


class Case:
    """Groups of `sizes` rows, each padded to 128 as `route` does; all that padding holds is NaN."""

    def __init__(self, sizes: list[int], width: int, k: int) -> None:
        padded = [ceil_div(size, BLOCK) * BLOCK for size in sizes]
        self.used = sum(padded)
        rows = self.used + BLOCK
        real = torch.cat(
            [torch.arange(p) < s for s, p in zip(sizes, padded, strict=True)]
            + [torch.zeros(BLOCK, dtype=torch.bool)]
        )
        real &= torch.rand(rows) > 0.1  # and padding in the midst of a group
        slots = torch.where(real, torch.randperm(rows), -1).int()
        slots[self.used :] = -2
        x = torch.randn(rows, k) * torch.randint(-4, 5, (rows, 1)).exp2()
        w = torch.randn(len(sizes), width, k) * torch.rand(len(sizes), width, 1)
        self.a = quant.per_token(x.bfloat16(), pow2=True)
        self.b = quant.per_block(w.bfloat16(), pow2=False)
        # Spread over rows and columns, so that every scale is one of its own.
        h = torch.randn(rows, 2 * width) * torch.randint(-3, 3, (rows, 1)).exp2()
        h *= torch.randint(-2, 3, (2 * width,)).exp2()
        h8 = quant.per_token(h.bfloat16(), pow2=False)
        self.h = FP8Tensor(h8.data, empty_scale(rows, 2 * width // BLOCK).copy_(h8.scale))
        for t in (self.a, self.h):
            t.data.view(torch.uint8)[~real] = NAN_BYTE
            t.scale[~real] = math.nan
        self.ends = torch.tensor(padded).cumsum(0).int()
        self.weights, self.slots = torch.rand(rows, 1), slots

    def da(self) -> torch.Tensor:
        (m, k), (e, n, _) = self.a.data.shape, self.b.data.shape
        da = torch.empty((m, n), dtype=torch.bfloat16)
        p = Problem(Grouping.M_GROUPED, Output.BF16, m, n, k, e)
        gemm._launch(p, *self.a, *self.b, self.ends, da, (gemm_swiglu_backward.TILE, 2))
        return da

    def apart(self, pow2: bool) -> swiglu.Backward:
        return swiglu._backward_cuda(*self.h, self.da(), self.weights, self.slots, pow2)

    def fused(self, pow2: bool) -> swiglu.Backward:
        return gemm_swiglu_backward._cuda(
            *self.a, *self.b, self.ends, *self.h, self.weights, self.slots, pow2
        )

    def start(self, emulated: Start) -> torch.Tensor:
        words = emulated(gemm, gemm_swiglu_backward, swiglu)
        # Their addresses are in a struct.
        emulated.readable += [*self.h, self.weights, self.slots]
        return words

    def check(self, fused: swiglu.Backward, apart: swiglu.Backward) -> None:
        for sums in (fused[6], apart[6]):  # a GPU has one NaN, this CPU passes on those of addends
            sums[sums.isnan()] = math.nan
        for got, wanted in zip(fused, apart, strict=True):
            assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
            # Whole outputs: neither writes past the last group.
            assert_same(got, wanted)


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
@pytest.mark.parametrize(
    ("sizes", "width", "k"),
    [([40, 0, 131], 256, 400), ([0, 1, 128, 0], 384, 128), ([300], 128, 1152), ([0, 0], 128, 128)],
    ids=str,
)
def test_bits_of_both_kernels(
    emulated: Start, sizes: list[int], width: int, k: int, pow2: bool
) -> None:
    case = Case(sizes, width, k)
    words = case.start(emulated)
    case.check(case.fused(pow2), case.apart(pow2))
    assert not words.any()


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
def test_blocks_unlike_each_other(emulated: Start, pow2: bool) -> None:
    """Rows and blocks of zeros, NaN and Inf, tiny and huge ones, in g, u and da."""
    case = Case([128, 256], 256, 256)
    g, scale = case.h.data.view(torch.uint8), case.h.scale
    case.a.data[2] = 0
    case.a.scale[3] = math.inf
    case.a.scale[5] *= 2.0**-60
    case.a.scale[7] *= 2.0**60
    case.b.data.view(torch.uint8)[1, 130, 9] = NAN_BYTE
    g[128:256, 128:256] = 0  # a gate of zeros: one block of the activation, and of du
    g[260:380, 5] = 0
    scale[300, 1] *= 2.0**20
    g[301, 300] = NAN_BYTE
    words = case.start(emulated)
    apart = case.apart(pow2)
    assert apart[5].isnan().any() and apart[3].isnan().any() and apart[1].isnan().any()
    assert (apart[5] <= 2.0**-56).any() and not apart[5][:, :3].isnan().all()
    case.check(case.fused(pow2), apart)
    assert not words.any()


def test_a_group_that_ends_within_a_block_is_reported_and_left_out(emulated: Start) -> None:
    case = Case([128, 128, 128], 128, 128)
    case.ends.copy_(torch.tensor([128, 200, 384]))
    words = case.start(emulated)
    dh, *_ = case.fused(True)
    assert words[:4].tolist() == [5, 1, 200, 128]
    assert (dh[128:].view(torch.uint8) == 0xA5).all()
    assert not (dh[:128].view(torch.uint8) == 0xA5).all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("* d.h_scale_stride + first_row + r", "* d.h_scale_stride + first_row"),
        ("column / 128 + m * (p.n / 128)", "column / 128"),
        ("group * 64, valid)", "group * 64, true)"),
        ("da[i] = 0;", ";"),
        ("(r * 2 + m) * (i64)p.n", "m * (i64)p.n"),
        ("g_halves[0], g_halves[1]);", "g_halves[1], g_halves[0]);"),
        ("sum[2 * group + j / 2]", "sum[2 * group + j % 2]"),
        ("column + 128 < p.n) load_h", "column < p.n) load_h"),
        ("if (column >= p.n) break;", "if (column + 128 >= p.n) break;"),
        ("halve_max<8, 8>(m)", "halve_max<16, 8>(m)"),
        ("abs_bits_16x2(m[0]), abs_bits_16x2(m[1])", "abs_bits_16x2(m[0]), m[1]"),
        ("lane % 8 / 2 * 16 + lane / 8 * 2", "lane % 8 / 2 * 16 + lane / 8"),
        ("lane % 2, warp)", "lane % 2, 0)"),
        ("first.x, second.x, first.y", "first.x, first.y, second.x"),
        ("k / 2 * 64 + k % 2 * 8) * 128", "k / 2 * 64 + k % 2 * 16) * 128"),
        ("own_column(k / 2) + k % 2 * 8", "own_column(k / 2)"),
        ("which == 1 ? p.n / 128 : 0", "0"),
        ("s.aw_max[lane % WARPS]", "s.aw_max[warp]"),
        ("<const u16*>(s.column_max[w][matrix])", "<const u16*>(s.column_max[w][0])"),
        ("column + matrix * p.n + c]", "column + c]"),
        ("d.dh_t + p.n * capacity + at", "d.dh_t + at"),
        ("da[i] = next[i]", "da[i] = da[i]"),
        ("block * (capacity / 128) + row_block", "block + row_block"),
        ("kb * BLOCK_K, t.a_row / 16", "kb * BLOCK_K, t.a_row / 32"),
        ("SECOND_ROW = OUTPUT == OUTPUT_SWIGLU_BACKWARD ? 1 : 8", "SECOND_ROW = 8"),
        ("named_barrier<COLUMN_THREADS>(1)", ""),
    ],
    ids=(
        "row scale,up scale,zeros of h,padding of da,second row,pair,sum,next half,last half,"
        "exchange,maxima,column,chunk,inverse,run,inverse of run,up block,block maximum,matrix,"
        "channel,up rows,half,activation block,rows of a,scales of a,barrier"
    ).split(","),
)
def test_a_planted_error_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    case = Case([40, 131], 384, 256)
    case.start(emulated)
    apart = case.apart(True)
    plant(monkeypatch, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        case.check(case.fused(True), apart)


def test_the_outputs_have_the_layout_of_the_two_kernels() -> None:
    case = Case([40, 131], 256, 128)
    da = torch.zeros(len(case.slots), 256, dtype=torch.bfloat16)
    wanted = swiglu._backward_fake(*case.h, da, case.weights, case.slots, True)
    got = gemm_swiglu_backward._fake(
        *case.a, *case.b, case.ends, *case.h, case.weights, case.slots, True
    )
    for a, b in zip(got, wanted, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    assert got[0].dtype == FP8_DTYPE
