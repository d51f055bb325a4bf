"""SwiGLU's backward pass in the epilogue of the GEMM, against the GEMM and then the kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8moe
from fp8moe import quant, testing
from fp8moe.kernels import gemm, gemm_swiglu_backward, heuristics, reference, swiglu
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div, empty_scale
from fp8moe.kernels.gemm_swiglu_backward import m_grouped_gemm_swiglu_backward
from fp8moe.kernels.heuristics import Grouping, Output, Problem

Tensors = tuple[torch.Tensor, ...]

pow2s = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])


class Case:
    """Groups of `sizes` rows, each padded to 128; what padding rows hold is NaN."""

    def __init__(
        self, sizes: list[int], width: int, k: int, device: torch.device | str, blocks: int = 1
    ) -> None:
        padded = [ceil_div(size, BLOCK) * BLOCK for size in sizes]
        self.used = sum(padded)
        rows = self.used + blocks * BLOCK
        real = torch.zeros(rows, dtype=torch.bool)
        start = 0
        for size, whole in zip(sizes, padded, strict=True):
            real[start : start + size] = True
            start += whole
        real &= torch.rand(rows) > 0.05
        slots = torch.where(real, torch.randperm(rows), -1).int()
        slots[self.used :] = -2
        dy = torch.randn(rows, k) * torch.randint(-4, 5, (rows, 1)).exp2()
        w = torch.randn(len(sizes), width, k) / k**0.5
        h = torch.randn(rows, 2 * width) * torch.randint(-2, 3, (rows, 1)).exp2()
        a = quant.per_token(dy.to(device, torch.bfloat16), pow2=True)
        h8 = quant.per_token(h.to(device, torch.bfloat16), pow2=True)
        self.real = real.to(device)
        for t in (a, h8):
            t.data.view(torch.uint8)[~self.real] = 0x7F
            t.scale[~self.real] = math.nan
        self.args = (
            a,
            quant.per_block(w.to(device, torch.bfloat16), pow2=False),
            torch.tensor(padded).cumsum(0).to(device, torch.int32),
            h8,
            torch.rand(rows, 1).to(device),
            slots.to(device),
        )

    def flat(self, pow2: bool) -> tuple:
        a, b, ends, h, *rest = self.args
        return (*a, *b, ends, *h, *rest, pow2)

    def outputs(self) -> swiglu.Backward:
        """Full of poison."""
        out = gemm_swiglu_backward._fake(*self.flat(True))
        for t in out:
            t.view(torch.uint8).fill_(0xA5) if t.dtype == FP8_DTYPE else t.fill_(float("inf"))
        return out

    def fused(self, pow2: bool) -> swiglu.Backward:
        out = self.outputs()
        gemm_swiglu_backward._launch(*self.flat(pow2), out)
        return out

    def apart(self, pow2: bool) -> swiglu.Backward:
        """With the tile of the fused kernel, so that the sums are formed alike."""
        a, b, ends, h, weights, slots = self.args
        (m, k), (e, n, _) = a.data.shape, b.data.shape
        da = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device=a.data.device)
        p = Problem(Grouping.M_GROUPED, Output.BF16, m, n, k, e)
        gemm._launch(p, *a, *b, ends, da, (gemm_swiglu_backward.TILE, 2))
        return swiglu.swiglu_backward_cast(*h, da, weights, slots, pow2)

    def written(self, out: Tensors) -> list[torch.Tensor]:
        """Of each output, what belongs to rows of a group."""
        dh, dh_scale, dh_t, dh_t_scale, aw_t, aw_t_scale, dprob = out
        rows, blocks = self.used, self.used // BLOCK
        return [
            dh[:rows],
            dh_scale[:rows],
            dh_t[:, :rows],
            dh_t_scale[:, :blocks],
            aw_t[:, :rows],
            aw_t_scale[:, :blocks],
            dprob[:, :rows],
        ]

    def rest(self, out: Tensors) -> list[torch.Tensor]:
        dh, dh_scale, dh_t, dh_t_scale, aw_t, aw_t_scale, dprob = out
        rows, blocks = self.used, self.used // BLOCK
        return [
            dh[rows:],
            dh_scale[rows:],
            dh_t[:, rows:],
            dh_t_scale[:, blocks:],
            aw_t[:, rows:],
            aw_t_scale[:, blocks:],
            dprob[:, rows:],
        ]

    def differences(self, got: Tensors, wanted: Tensors) -> list[int]:
        """Elements of each output whose bits differ in the rows of groups."""
        return [
            int((testing.bits(g) != testing.bits(w)).sum())
            for g, w in zip(self.written(got), self.written(wanted), strict=True)
        ]

    def assert_poison(self, out: Tensors) -> None:
        for t in self.rest(out):
            raw = t.contiguous()
            poison = raw.view(torch.uint8) == 0xA5 if t.dtype == FP8_DTYPE else raw.isinf()
            assert bool(poison.all())


NONE = [0] * 7

# ------------------------------------------------------------------------------------- everywhere


@pow2s
def test_the_operator_is_both_operators(device: torch.device, pow2: bool) -> None:
    case = Case([40, 0, 131, 1], 256, 384, device)
    a, b, ends, h, weights, slots = case.args
    da = gemm.m_grouped_gemm_nt(a, b, ends)
    apart = swiglu.swiglu_backward_cast(*h, da, weights, slots, pow2)
    fused = m_grouped_gemm_swiglu_backward(*case.args, pow2)
    assert case.differences(fused, apart) == NONE
    for f, p in zip(fused, apart, strict=True):
        assert (f.shape, f.stride(), f.dtype) == (p.shape, p.stride(), p.dtype)
    pad = ~case.real[: case.used]
    assert bool(pad.any()) and not fused[0][: case.used][pad].view(torch.uint8).any()
    # Negative control: the weights of other rows leave the sums of dprob alone.
    weights.copy_(weights.roll(1, 0))
    changed = case.differences(m_grouped_gemm_swiglu_backward(*case.args, pow2), apart)
    assert changed[0] > 0 and changed[2] > 0 and changed[4] > 0 and changed[6] == 0


def test_against_fp64(device: torch.device) -> None:
    """The dequantized results follow exact mathematics on the same operands."""
    case = Case([70, 0, 129], 128, 256, device)
    a, b, ends, h, weights, slots = case.args
    dh, dh_scale, _, _, _, _, dprob = m_grouped_gemm_swiglu_backward(*case.args, True)
    real = case.real[: case.used]
    da = testing.oracle_m_grouped_gemm_nt(a, b, ends)[: case.used][real]
    gate, up = testing.exact(h)[: case.used][real].chunk(2, dim=1)
    p = weights.double().flatten()[slots[: case.used][real].long()][:, None]
    s = torch.sigmoid(gate)
    exact = torch.cat([p * da * up * s * (1 + gate * (1 - s)), p * da * gate * s], dim=1)
    got = testing.exact(FP8Tensor(dh[: case.used], dh_scale[: case.used]))[real]
    assert testing.sqnr_db(got, exact) > 29
    assert testing.sqnr_db(got.roll(1, 0), exact) < 10
    sums = (da * gate * s * up).sum(1)
    assert testing.sqnr_db(dprob[0, : case.used][real], sums) > 40
    assert testing.sqnr_db(dprob[0, : case.used][real].roll(1, 0), sums) < 10


def test_fake_outputs_match_real_ones() -> None:
    case = Case([50, 20], 128, 256, "cpu")
    op = gemm_swiglu_backward._m_grouped_gemm_swiglu_backward
    real = op(*case.flat(True))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in case.flat(True)]
        fake = op(*fakes)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


@pow2s
def test_no_rows(device: torch.device, pow2: bool) -> None:
    b = quant.per_block(torch.randn(2, 128, 256, device=device).bfloat16(), pow2=False)
    a = quant.per_token(torch.zeros(0, 256, dtype=torch.bfloat16, device=device), pow2=True)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    ends = torch.zeros(2, dtype=torch.int32, device=device)
    weights = torch.zeros(0, 1, device=device)
    out = m_grouped_gemm_swiglu_backward(a, b, ends, a, weights, none, pow2)
    assert [tuple(t.shape) for t in out[:4]] == [(0, 256), (0, 2), (256, 0), (256, 0)]
    assert [tuple(t.shape) for t in out[4:]] == [(128, 0), (1, 0), (1, 0)]


def test_shared_memory_fits_for_any_number_of_groups() -> None:
    for groups in (1, heuristics.FEW_GROUPS, heuristics.MAX_GROUPS):
        assert gemm_swiglu_backward._shared_memory(groups) <= heuristics.SHARED_MEMORY
    # A stage more would not fit: nothing is given away.
    more = gemm_swiglu_backward._shared_memory(1) + gemm_swiglu_backward.TILE.stage_bytes
    assert more > heuristics.SHARED_MEMORY


def test_the_reference_is_the_two_references() -> None:
    case = Case([40, 0, 131, 1], 128, 256, "cpu")
    a, b, ends, h, weights, slots = case.args
    da = torch.zeros(len(slots), 128, dtype=torch.bfloat16)
    reference.m_grouped_gemm_nt(*a, *b, ends, da)
    wanted = reference.swiglu_backward_cast(*h, da, weights, slots, False)
    got = reference.m_grouped_gemm_swiglu_backward(*case.flat(False))
    assert case.differences(got, wanted) == NONE


# --------------------------------------------------------------------------------- bad arguments

A = FP8Tensor(torch.zeros(128, 256, dtype=FP8_DTYPE), empty_scale(128, 2))
B = FP8Tensor(torch.zeros(2, 128, 256, dtype=FP8_DTYPE), torch.ones(2, 1, 2))
ENDS = torch.tensor([0, 128], dtype=torch.int32)
SLOTS = torch.full((128,), -1, dtype=torch.int32)
P = torch.zeros(4, 2)
NARROW = FP8Tensor(torch.zeros(2, 64, 256, dtype=FP8_DTYPE), torch.ones(2, 1, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: FP8Tensor(A.data.float(), A.scale)}, "a.data: expected dtype"),
        ({0: FP8Tensor(A.data, A.scale.contiguous())}, "a.scale: expected MN-major"),
        ({1: FP8Tensor(B.data[:, :, :128].contiguous(), B.scale)}, "b.data: expected K = 256"),
        ({1: FP8Tensor(B.data, B.scale[:, :, :1])}, "b.scale: expected"),
        ({1: NARROW}, r"b.data: rows of an expert \(I\): expected a multiple of 128, got 64"),
        ({2: ENDS.long()}, "group_ends: expected a contiguous 1D int32"),
        ({2: ENDS[:1]}, "group_ends: expected 2 groups"),
        ({2: ENDS + 64}, r"group_ends: .* at most 128 .* group_ends\[1\] = 192"),
        ({2: ENDS.clamp(min=64)}, r"group_ends: .* multiples of 128, got group_ends\[0\] = 64"),
        ({3: FP8Tensor(A.data.bfloat16(), A.scale)}, "h.data: expected torch.float8_e4m3fn"),
        ({3: FP8Tensor(A.data[:, :128], A.scale)}, r"h.data: expected shape \(128, 256\)"),
        ({3: FP8Tensor(A.data, A.scale[:, :1])}, r"h.scale: expected \(128, 2\)"),
        ({4: P.double()}, "topk_weights: expected torch.float32"),
        ({5: SLOTS.long()}, "slot_of_row: expected torch.int32"),
        ({5: SLOTS.repeat(2)}, r"slot_of_row: expected shape \(128\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[int, object], text: str) -> None:
    args = [A, B, ENDS, A, P, SLOTS, True]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=text):
        m_grouped_gemm_swiglu_backward(*args)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- GPU only

GROUPS = [[40, 0, 130, 1], [0, 0, 128, 0], [0, 0, 0], [0, 1000, 0, 0], [256] * 4, [1] * 20]


@pytest.mark.gpu
@pow2s
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize(("width", "k"), [(128, 128), (384, 400), (768, 2048)])
def test_bits_of_the_two_kernels(sizes: list[int], width: int, k: int, pow2: bool) -> None:
    case = Case(sizes, width, k, "cuda")
    fused = case.fused(pow2)
    assert case.differences(fused, case.apart(pow2)) == NONE
    case.assert_poison(fused)
    fp8moe.check_errors()


@pytest.mark.gpu
@pow2s
def test_extreme_rows(pow2: bool) -> None:
    """Rows that are zero, tiny, huge, infinite or NaN leave the bits of the two kernels."""
    case = Case([300, 140], 256, 512, "cuda")
    a, b, _, h, *_ = case.args
    a.data.view(torch.uint8)[3] = 0
    a.scale[5] = 2.0**-50
    a.scale[6] = 2.0**60
    a.scale[7] = float("inf")
    b.data.view(torch.uint8)[1, 5, 9] = 0x7F
    h.data.view(torch.uint8)[128:256, :128] = 0
    h.data.view(torch.uint8)[270, 400] = 0x7F
    assert case.differences(case.fused(pow2), case.apart(pow2)) == NONE


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [heuristics.FEW_GROUPS, heuristics.FEW_GROUPS + 1, 1024])
def test_many_groups(groups: int) -> None:
    """Both lengths of the group table."""
    ends = testing.ragged_group_ends(40 * groups, groups, seed=2, kind="zipf", device="cpu")
    case = Case(ends.diff(prepend=ends.new_zeros(1)).tolist(), 128, 400, "cuda")
    fused = case.fused(True)
    assert case.differences(fused, case.apart(True)) == NONE
    case.assert_poison(fused)


@pytest.mark.gpu
def test_the_comparison_sees_one_wrong_byte() -> None:
    case = Case([200, 100], 128, 256, "cuda")
    fused, apart = case.fused(True), case.apart(True)
    fused[2].view(torch.uint8)[17, 200] ^= 1
    assert case.differences(fused, apart) == [0, 0, 1, 0, 0, 0, 0]


@pytest.mark.gpu
def test_three_hundred_repeats_are_bitwise_equal() -> None:
    case = Case([129, 0, 511, 64, 3, 777], 384, 1024, "cuda")
    first = case.fused(True)  # what is not written holds the same poison each time
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(300):
        for a, b in zip(first, case.fused(True), strict=True):
            raw = torch.uint8 if a.dtype == FP8_DTYPE else torch.int32
            same &= (a.view(raw) == b.view(raw)).all()
    assert bool(same)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([256, 128, 384], "non-decreasing"),
        ([128, 256, 999], "at most 384"),
        ([128, 200, 384], "multiples of 128"),
    ],
)
def test_bad_group_ends_are_reported_and_stay_in_bounds(ends: list[int], text: str) -> None:
    case = Case([100, 50, 106], 128, 128, "cuda", blocks=0)
    case.args[2].copy_(torch.tensor(ends))
    case.fused(True)
    with pytest.raises(ValueError, match=text):
        fp8moe.check_errors()
    fp8moe.check_errors()


@pytest.mark.gpu
def test_captured_in_a_graph_and_replayed_with_other_groups() -> None:
    case = Case([128, 128, 128, 128], 256, 256, "cuda", blocks=0)
    ends, slots = case.args[2], case.args[5]
    out = case.fused(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm_swiglu_backward._launch(*case.flat(True), out)
    ends.copy_(torch.tensor([128, 128, 384, 512]))
    slots.copy_(slots.roll(128))
    graph.replay()
    torch.cuda.synchronize()
    assert case.differences(out, case.apart(True)) == NONE
