"""SwiGLU in the epilogue of the GEMM, against the GEMM and then the SwiGLU kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8moe
from fp8moe import quant, testing
from fp8moe.kernels import gemm, gemm_swiglu, heuristics, jit, reference, swiglu
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div, empty_scale
from fp8moe.kernels.gemm_swiglu import m_grouped_gemm_swiglu
from fp8moe.kernels.heuristics import Grouping, Output, Problem

Tensors = tuple[torch.Tensor, ...]

pow2s = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])


class Case:
    """x in expert order, w13 and a routing map with padding in all groups. `sizes` are any."""

    def __init__(
        self, sizes: list[int], width: int, k: int, device: torch.device | str, slack: int = 130
    ) -> None:
        self.used = sum(sizes)
        rows = ceil_div(self.used + slack, BLOCK) * BLOCK
        x = torch.randn(rows, k) * torch.randint(-4, 5, (rows, 1)).exp2()
        w = torch.randn(len(sizes), 2 * width, k) / k**0.5
        slots = torch.randperm(rows).int()
        slots[torch.rand(rows) < 0.1] = -1
        slots[self.used :] = -1
        slots[ceil_div(self.used, BLOCK) * BLOCK :] = -2
        x8 = quant.per_token(x.to(device, torch.bfloat16), pow2=True)
        # Padding of x is not written by its kernel: make it as bad as it gets.
        x8.data.view(torch.uint8)[(slots < 0).to(device)] = 0x7F
        x8.scale[(slots < 0).to(device)] = float("nan")
        self.args = (
            x8,
            quant.per_block(w.to(device, torch.bfloat16), pow2=False),
            torch.tensor(sizes).cumsum(0).to(device, torch.int32),
            torch.rand(rows, 1).to(device),
            slots.to(device),
        )

    def flat(self, pow2: bool) -> tuple:
        a, b, *rest = self.args
        return (*a, *b, *rest, pow2)

    def outputs(self) -> Tensors:
        """Full of poison."""
        out = gemm_swiglu._fake(*self.flat(True))
        for t in out:
            t.view(torch.uint8).fill_(0xA5) if t.dtype == FP8_DTYPE else t.fill_(float("inf"))
        return out

    def fused(self, pow2: bool) -> Tensors:
        out = self.outputs()
        gemm_swiglu._launch(*self.flat(pow2), out)
        return out

    def apart(self, pow2: bool) -> Tensors:
        """With the tile of the fused kernel, so that the sums are formed alike."""
        a, b, ends, weights, slots = self.args
        (m, k), (e, n, _) = a.data.shape, b.data.shape
        h = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device=a.data.device)
        p = Problem(Grouping.M_GROUPED, Output.BF16, m, n, k, e)
        gemm._launch(p, *a, *b, ends, h, (gemm_swiglu.TILE, 2))
        return swiglu.swiglu_cast_both(h, weights, slots, pow2)


def differences(got: Tensors, wanted: Tensors, used: int) -> list[int]:
    """Elements of each output whose bits differ in the used rows."""
    return [
        int((testing.bits(g[:used]) != testing.bits(w[:used])).sum())
        for g, w in zip(got, wanted, strict=True)
    ]


def assert_poison(out: Tensors, used: int) -> None:
    for data, scale in (out[:2], out[2:]):
        assert bool((data[used:].view(torch.uint8) == 0xA5).all())
        assert bool(scale[used:].isinf().all())


# ------------------------------------------------------------------------------------- everywhere


@pow2s
def test_the_operator_is_both_operators(device: torch.device, pow2: bool) -> None:
    case = Case([40, 0, 131, 1], 256, 384, device)
    a, b, ends, weights, slots = case.args
    h = gemm.m_grouped_gemm_nt(a, b, ends)
    apart = swiglu.swiglu_cast_both(h, weights, slots, pow2)
    fused = m_grouped_gemm_swiglu(*case.args, pow2)
    assert differences(fused, apart, case.used) == [0, 0, 0, 0]
    for f, p in zip(fused, apart, strict=True):
        assert (f.shape, f.stride(), f.dtype) == (p.shape, p.stride(), p.dtype)
    pad = (slots[: case.used] < 0).nonzero().flatten()
    assert len(pad) and not fused[0][pad].view(torch.uint8).any()
    assert not fused[2][pad].view(torch.uint8).any()
    # Negative control: the weights of other rows.
    weights.copy_(weights.roll(1, 0))
    changed = differences(m_grouped_gemm_swiglu(*case.args, pow2), apart, case.used)
    assert changed[0] > 0 and changed[2:] == [0, 0]


def test_against_fp64(device: torch.device) -> None:
    """The dequantized results follow exact mathematics on the same operands."""
    case = Case([70, 0, 129], 128, 256, device)
    a, b, ends, weights, slots = case.args
    act, act_scale, h, h_scale = (t[: case.used] for t in m_grouped_gemm_swiglu(*case.args, True))
    real = slots[: case.used] >= 0
    exact = testing.oracle_m_grouped_gemm_nt(a, b, ends)[real]
    gate, up = exact.chunk(2, dim=1)
    p = weights.double().flatten()[slots[: case.used][real].long()][:, None]
    for got, wanted in (
        (FP8Tensor(h, h_scale), exact),
        (FP8Tensor(act, act_scale), p * torch.nn.functional.silu(gate) * up),
    ):
        assert testing.sqnr_db(testing.exact(got)[real], wanted) > 29
        assert testing.sqnr_db(testing.exact(got)[real].roll(1, 0), wanted) < 10


def test_fake_outputs_match_real_ones() -> None:
    case = Case([50, 20], 128, 256, "cpu")
    real = gemm_swiglu._m_grouped_gemm_swiglu(*case.flat(True))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in case.flat(True)]
        fake = gemm_swiglu._m_grouped_gemm_swiglu(*fakes)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_compiles_into_one_graph(device: torch.device) -> None:
    case = Case([50, 20], 128, 256, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*args: torch.Tensor) -> Tensors:
        a, b = FP8Tensor(*args[:2]), FP8Tensor(*args[2:4])
        return m_grouped_gemm_swiglu(a, b, *args[4:], True)

    got = compiled(*case.flat(True)[:-1])
    assert differences(got, m_grouped_gemm_swiglu(*case.args, True), case.used) == [0, 0, 0, 0]


@pow2s
def test_no_rows(device: torch.device, pow2: bool) -> None:
    b = quant.per_block(torch.randn(2, 256, 128, device=device).bfloat16(), pow2=False)
    a = quant.per_token(torch.zeros(0, 128, dtype=torch.bfloat16, device=device), pow2=True)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    ends = torch.zeros(2, dtype=torch.int32, device=device)
    out = m_grouped_gemm_swiglu(a, b, ends, torch.zeros(0, 1, device=device), none, pow2)
    assert [tuple(t.shape) for t in out] == [(0, 128), (0, 1), (0, 256), (0, 2)]


def test_shared_memory_and_panels_are_those_of_the_bf16_output() -> None:
    """The stages are counted for two panels of staging a warp, which the epilogue has too."""
    assert gemm_swiglu.TILE.async_store(True)
    stages = [dict(s.constants)["STAGES"] for s in gemm_swiglu.kernel_specs()]
    assert sorted(stages) == [3, 3, 4, 4]
    source = (jit.CSRC / "epilogue_swiglu.cuh").read_text()
    assert "STAGING_BYTES = 2 * PANEL_BYTES" in source


# --------------------------------------------------------------------------------- bad arguments

A = FP8Tensor(torch.zeros(128, 256, dtype=FP8_DTYPE), empty_scale(128, 2))
B = FP8Tensor(torch.zeros(2, 256, 256, dtype=FP8_DTYPE), torch.ones(2, 2, 2))
ENDS = torch.tensor([30, 64], dtype=torch.int32)
SLOTS = torch.full((128,), -1, dtype=torch.int32)
P = torch.zeros(4, 2)
NARROW = FP8Tensor(torch.zeros(2, 384, 256, dtype=FP8_DTYPE), torch.ones(2, 3, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: FP8Tensor(A.data.float(), A.scale)}, "a.data: expected dtype"),
        ({0: FP8Tensor(A.data, A.scale.contiguous())}, "a.scale: expected MN-major"),
        ({1: FP8Tensor(B.data[:, :, :128].contiguous(), B.scale)}, "b.data: expected K = 256"),
        ({1: FP8Tensor(B.data, B.scale[:, :1])}, "b.scale: expected"),
        ({1: NARROW}, r"b.data: rows of an expert \(2I\): expected a multiple of 256, got 384"),
        ({2: ENDS.long()}, "group_ends: expected a contiguous 1D int32"),
        ({2: ENDS[:1]}, "group_ends: expected 2 groups"),
        ({2: ENDS + 100}, "group_ends"),
        ({3: P.double()}, "topk_weights: expected torch.float32"),
        ({3: P[0]}, "topk_weights: expected shape"),
        ({4: SLOTS.long()}, "slot_of_row: expected torch.int32"),
        ({4: SLOTS[:100]}, "slot_of_row: expected a multiple of 128"),
        ({4: SLOTS.repeat(2)}, r"slot_of_row: expected shape \(128\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[int, object], text: str) -> None:
    args = [A, B, ENDS, P, SLOTS, True]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=text):
        m_grouped_gemm_swiglu(*args)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- GPU only

GROUPS = [
    [40, 0, 130, 1],
    [0, 0, 128, 0],
    [0, 0, 0],
    [0, 1000, 0, 0],
    [127, 129, 1, 7, 255],
    [256] * 4,
    [1] * 20,
]


@pytest.mark.gpu
@pow2s
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize(("width", "k"), [(128, 128), (256, 400), (768, 2048)])
def test_bits_of_the_two_kernels(sizes: list[int], width: int, k: int, pow2: bool) -> None:
    case = Case(sizes, width, k, "cuda")
    fused = case.fused(pow2)
    assert differences(fused, case.apart(pow2), case.used) == [0, 0, 0, 0]
    assert_poison(fused, case.used)
    fp8moe.check_errors()


@pytest.mark.gpu
@pow2s
def test_extreme_rows(pow2: bool) -> None:
    """Rows that are zero, tiny, huge, infinite or NaN leave the bits of the two kernels."""
    case = Case([300, 40], 256, 512, "cuda")
    a, b, *_ = case.args
    a.data.view(torch.uint8)[3] = 0
    a.scale[5] = 2.0**-50
    a.scale[6] = 2.0**60
    a.scale[7] = float("inf")
    b.data.view(torch.uint8)[1, 5, 9] = 0x7F
    assert differences(case.fused(pow2), case.apart(pow2), case.used) == [0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [heuristics.FEW_GROUPS, heuristics.FEW_GROUPS + 1, 1024])
def test_many_groups(groups: int) -> None:
    """Both lengths of the group table, which leave room for different numbers of stages."""
    ends = testing.ragged_group_ends(40 * groups, groups, seed=2, kind="zipf", device="cpu")
    case = Case(ends.diff(prepend=ends.new_zeros(1)).tolist(), 128, 400, "cuda")
    fused = case.fused(True)
    assert differences(fused, case.apart(True), case.used) == [0, 0, 0, 0]
    assert_poison(fused, case.used)


@pytest.mark.gpu
def test_the_comparison_sees_one_wrong_byte() -> None:
    case = Case([200, 100], 128, 256, "cuda")
    fused, apart = case.fused(True), case.apart(True)
    fused[2].view(torch.uint8)[17, 200] ^= 1
    assert differences(fused, apart, case.used) == [0, 0, 1, 0]


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
    ("ends", "text"), [([100, 50, 256], "non-decreasing"), ([100, 150, 999], "at most 256")]
)
def test_bad_group_ends_are_reported_and_stay_in_bounds(ends: list[int], text: str) -> None:
    case = Case([100, 50, 106], 128, 128, "cuda", slack=0)
    case.args[2].copy_(torch.tensor(ends))
    case.fused(True)
    with pytest.raises(ValueError, match=text):
        fp8moe.check_errors()
    fp8moe.check_errors()


@pytest.mark.gpu
def test_captured_in_a_graph_and_replayed_with_other_groups() -> None:
    case = Case([128, 128, 128, 128], 256, 256, "cuda", slack=0)
    ends, slots = case.args[2], case.args[4]
    out = case.fused(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm_swiglu._launch(*case.flat(True), out)
    ends.copy_(torch.tensor([7, 7, 500, 512]))
    slots.copy_(slots.roll(1))
    graph.replay()
    torch.cuda.synchronize()
    assert differences(out, case.apart(True), case.used) == [0, 0, 0, 0]


def _unfused(
    a: FP8Tensor,
    b: FP8Tensor,
    ends: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor,
    pow2: bool,
) -> Tensors:
    return swiglu.swiglu_cast_both(gemm.m_grouped_gemm_nt(a, b, ends), weights, slots, pow2)


@pow2s
def test_the_layer_is_bitwise_the_same_without_the_fusion(
    device: torch.device, pow2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8moe.functional import experts

    ids, weights = testing.random_topk(700, 4, 8, seed=1, dropped=0.05)
    size = 512 if device.type == "cuda" else 256
    leaves = [
        t.to(device).requires_grad_()
        for t in (
            torch.randn(700, size).bfloat16(),
            weights,
            torch.randn(8, 256, size) / size**0.5,
            torch.randn(8, size, 128) / 128**0.5,
        )
    ]
    x, p, w13, w2 = leaves
    dy = torch.randn(700, size).bfloat16().to(device)
    config = fp8moe.FP8Config(save="fp8", pow2_scales=pow2)

    def run() -> list[torch.Tensor]:
        y = experts.swiglu_experts(x, ids.to(device), p, w13, w2, config=config)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    calls: list[Callable] = []

    def counted(*args: object) -> Tensors:
        calls.append(_unfused)
        return _unfused(*args)  # type: ignore[arg-type]

    fused = run()
    monkeypatch.setattr(experts, "m_grouped_gemm_swiglu", counted)
    apart = run()
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


def test_the_reference_is_the_two_references() -> None:
    case = Case([40, 0, 131, 1], 128, 256, "cpu")
    a, b, ends, weights, slots = case.args
    h = torch.zeros(len(slots), 256, dtype=torch.bfloat16)
    reference.m_grouped_gemm_nt(*a, *b, ends, h)
    wanted = reference.swiglu_cast_both(h, weights, slots, False)
    got = reference.m_grouped_gemm_swiglu(*case.flat(False))
    assert differences(got, wanted, case.used) == [0, 0, 0, 0]
