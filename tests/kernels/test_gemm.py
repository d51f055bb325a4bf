"""The GEMM operators on CPU and GPU: FP64 oracle on the same FP8 inputs, worst-row error."""

from collections.abc import Callable

import pytest
import torch

from fp8moe import kernels, quant, testing
from fp8moe.kernels import gemm, heuristics
from fp8moe.kernels.fp8tensor import FP8Tensor, padded_capacity
from fp8moe.kernels.heuristics import Grouping, Output, Problem

GATE_BF16, GATE_F32 = testing.BF16_ROW_ERROR, testing.FP32_ROW_ERROR


def _operand(rows, k, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    return quant.per_token(x.to(device, torch.bfloat16), pow2=True)


def _weights(groups, n, k, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(groups, n, k, generator=generator)
    return quant.per_block(w.to(device, torch.bfloat16), pow2=False)


def _gate(n):
    """Half a BF16 ulp bounds every element; over a long row it averages to 1.7e-3."""
    return GATE_BF16 if n >= 128 else 2.0**-8


def _poisoned(shape, device, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def _ends(sizes, device):
    return torch.tensor(sizes).cumsum(0).to(device, torch.int32)


def _is_poison(t):
    return bool(t.isnan().all())


@pytest.mark.parametrize("m", [1, 7, 127, 128, 129, 300])
@pytest.mark.parametrize("n,k", [(8, 128), (136, 16), (576, 272), (256, 1024)])
def test_gemm_nt_matches_fp64(device, m, n, k):
    a, b = _operand(m, k, device), _weights(1, n, k, device)
    b = FP8Tensor(b.data[0], b.scale[0])
    out = kernels.gemm_nt(a, b, out=_poisoned((m, n), device))
    assert testing.worst_row_error(out, testing.oracle_gemm_nt(a, b)) < _gate(n)


@pytest.mark.parametrize(
    "sizes",
    [[40, 0, 130, 1], [0, 0, 128, 0], [0, 0, 0, 0], [0, 300, 0, 0], [127, 129, 1, 7], [256] * 4],
    ids=str,
)
@pytest.mark.parametrize("slack", [0, 37])
def test_m_grouped_matches_fp64_and_touches_no_other_row(device, sizes, slack):
    n, k, rows = 264, 400, sum(sizes) + slack
    if rows == 0:
        pytest.skip("no rows at all is covered by test_nothing_to_do")
    a, b = _operand(rows, k, device), _weights(4, n, k, device)
    out = _poisoned((rows, n), device)
    ends = _ends(sizes, device)
    kernels.m_grouped_gemm_nt(a, b, ends, out=out)
    exact = testing.oracle_m_grouped_gemm_nt(a, b, ends)
    assert testing.worst_row_error(out[: len(exact)], exact) < GATE_BF16
    assert slack == 0 or _is_poison(out[len(exact) :])


@pytest.mark.parametrize("m", [1, 63, 64, 65, 200])
def test_masked_matches_fp64_and_leaves_the_rest_alone(device, m):
    sizes, n, k = [m, 0, (m + 1) // 2, 1], 136, 384
    flat, b = _operand(4 * m, k, device), _weights(4, n, k, device)
    a = FP8Tensor(flat.data.view(4, m, k), flat.scale.unflatten(0, (4, m)))
    out = _poisoned((4, m, n), device)
    group_sizes = torch.tensor(sizes, dtype=torch.int32, device=device)
    kernels.m_grouped_gemm_nt_masked(a, b, group_sizes, out=out)
    for g, exact in enumerate(testing.oracle_m_grouped_gemm_nt_masked(a, b, group_sizes)):
        assert testing.worst_row_error(out[g, : sizes[g]], exact) < GATE_BF16
        assert sizes[g] == m or _is_poison(out[g, sizes[g] :])


def _wgrad_operands(sizes, n, k, device):
    rows, ends = sum(sizes), _ends(sizes, device)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(rows, n, generator=generator).to(device, torch.bfloat16)
    x = torch.randn(rows, k, generator=generator)
    # Blocks with scales far apart, so that one in another's place is seen.
    r, c = torch.arange(rows)[:, None] // 64, torch.arange(k) // 128
    x = (x * torch.exp2((r * 5 + c * 3) % 7 - 3.0)).to(device, torch.bfloat16)
    a = quant.per_channel(dy, ends, pow2=True)
    b = quant.per_channel(x, ends, pow2=True, block=True)
    # The data past the last group is undefined by contract: make it as bad as it gets.
    used = sum(-(-s // 128) * 128 for s in sizes)
    for t in (a, b):
        t.data.view(torch.uint8)[:, used:] = 0x7F
        t.scale[:, used // 128 :] = float("nan")
    return a, b, ends


@pytest.mark.parametrize(
    "sizes", [[40, 0, 130, 1], [0, 0, 0], [0, 300, 0], [128, 256, 127]], ids=str
)
@pytest.mark.parametrize("n,k", [(136, 264), (129, 128), (256, 520)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k_grouped_matches_fp64_and_writes_zeros_for_empty_groups(device, sizes, n, k, dtype):
    if sum(sizes) == 0:
        pytest.skip("all groups empty is covered by test_nothing_to_do")
    a, b, ends = _wgrad_operands(sizes, n, k, device)
    out = kernels.k_grouped_gemm(a, b, ends, out=_poisoned((len(sizes), n, k), device, dtype))
    exact = testing.oracle_k_grouped_gemm(a, b, ends)
    gate = GATE_F32 if dtype == torch.float32 else GATE_BF16
    for g, size in enumerate(sizes):
        if size:
            assert testing.worst_row_error(out[g], exact[g]) < gate
        else:
            assert not out[g].any()


def test_k_grouped_accumulates_into_main_grad(device):
    sizes, n, k = [200, 0, 60], 136, 256
    a, b, ends = _wgrad_operands(sizes, n, k, device)
    start = torch.randn(3, n, k, generator=torch.Generator().manual_seed(5)).to(device)
    once = kernels.k_grouped_gemm(a, b, ends, out=_poisoned((3, n, k), device, torch.float32))
    out = start.clone()
    for _ in range(2):
        kernels.k_grouped_gemm(a, b, ends, out=out, accumulate=True)
    assert torch.equal(out[1], start[1])
    torch.testing.assert_close(out, start + 2 * once, rtol=1e-6, atol=1e-4)


def test_nothing_to_do(device):
    b = _weights(3, 64, 128, device)
    ends = torch.zeros(3, dtype=torch.int32, device=device)
    empty = quant.per_token(torch.zeros(0, 128, dtype=torch.bfloat16, device=device), pow2=True)
    assert kernels.m_grouped_gemm_nt(empty, b, ends).shape == (0, 64)
    a = _operand(5, 128, device)
    out = kernels.m_grouped_gemm_nt(a, b, ends, out=_poisoned((5, 64), device))
    assert _is_poison(out)
    x = torch.zeros(0, 64, dtype=torch.bfloat16, device=device)
    a = quant.per_channel(x, ends, pow2=True)
    b = quant.per_channel(x, ends, pow2=True, block=True)
    assert not kernels.k_grouped_gemm(a, b, ends, out=_poisoned((3, 64, 64), device)).any()


def test_the_gate_rejects_what_a_global_similarity_lets_pass():
    a, b = _operand(300, 512, "cpu"), _weights(1, 256, 512, "cpu")
    b = FP8Tensor(b.data[0], b.scale[0])
    out = kernels.gemm_nt(a, b)
    exact = testing.oracle_gemm_nt(a, b)
    weakest = exact.norm(dim=1).argmin()
    out[weakest] = 0
    assert testing.similarity_error(out, exact) < 1e-3
    assert testing.worst_row_error(out, exact) > GATE_BF16


# ------------------------------------------------------------------------------------ GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("tile", heuristics.candidates(Grouping.M_GROUPED), ids=str)
def test_every_tile_of_the_grouped_gemm(tile):
    """Odd tile grids, ragged edges in every direction, rings shorter than K."""
    sizes, n, k = [0, 129, 1, 0, 384, 130, 7], 776, 1296
    rows = sum(sizes)
    a, b = _operand(rows, k, "cuda"), _weights(len(sizes), n, k, "cuda")
    ends = _ends(sizes, "cuda")
    exact = testing.oracle_m_grouped_gemm_nt(a, b, ends)
    p = Problem(Grouping.M_GROUPED, Output.BF16, rows, n, k, len(sizes))
    for band in (1, 3, 16):
        out = _poisoned((rows, n), "cuda")
        gemm._launch(p, a.data, a.scale, b.data, b.scale, ends, out, (tile, band))
        assert testing.worst_row_error(out, exact) < GATE_BF16


@pytest.mark.gpu
@pytest.mark.parametrize("tile", heuristics.candidates(Grouping.DENSE), ids=str)
@pytest.mark.parametrize("k", [1296, 400, 112])
@pytest.mark.parametrize("m", [651, 520, 3])
def test_every_tile_of_the_dense_gemm(tile, m, k):
    """Also parts of a split tile that are uneven or have nothing to contract, and a few CTAs that
    walk over all tiles."""
    n = 776
    a, b = _operand(m, k, "cuda"), _weights(1, n, k, "cuda")
    b = FP8Tensor(b.data[0], b.scale[0])
    p = Problem(Grouping.DENSE, Output.BF16, m, n, k)
    exact = testing.oracle_gemm_nt(a, b)
    first = None
    for spared in (0, 0, gemm.num_sms(0) - 3):
        out = _poisoned((m, n), "cuda")
        with gemm.sparing_sms(spared):
            gemm._launch(p, a.data, a.scale, b.data, b.scale, None, out, (tile, 2))
        assert testing.worst_row_error(out, exact) < GATE_BF16
        assert first is None or torch.equal(out, first)
        first = out


@pytest.mark.gpu
@pytest.mark.parametrize("tile", heuristics.candidates(Grouping.K_GROUPED), ids=str)
@pytest.mark.parametrize("output", list(Output))
def test_every_tile_of_the_weight_gradient(tile, output):
    sizes, n, k = [0, 129, 1, 0, 700, 128], 392, 776
    a, b, ends = _wgrad_operands(sizes, n, k, "cuda")
    dtype = torch.bfloat16 if output == Output.BF16 else torch.float32
    out = _poisoned((len(sizes), n, k), "cuda", dtype)
    if output == Output.ADD:
        out.zero_()
    capacity = padded_capacity(sum(sizes), len(sizes))
    p = Problem(Grouping.K_GROUPED, output, n, k, capacity, len(sizes))
    gemm._launch(p, a.data, a.scale, b.data, b.scale, ends, out, (tile, 2))
    exact = testing.oracle_k_grouped_gemm(a, b, ends)
    for g, size in enumerate(sizes):
        if size:
            gate = GATE_BF16 if output == Output.BF16 else GATE_F32
            assert testing.worst_row_error(out[g], exact[g]) < gate
        else:
            assert not out[g].any()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", heuristics.candidates(Grouping.MASKED), ids=str)
def test_every_tile_of_the_masked_gemm(tile):
    sizes, m, n, k = [0, 300, 1, 129], 300, 776, 1296
    flat, b = _operand(4 * m, k, "cuda"), _weights(4, n, k, "cuda")
    a = FP8Tensor(flat.data.view(4, m, k), flat.scale.unflatten(0, (4, m)))
    group_sizes = torch.tensor(sizes, dtype=torch.int32, device="cuda")
    out = _poisoned((4, m, n), "cuda")
    p = Problem(Grouping.MASKED, Output.BF16, m, n, k, 4)
    gemm._launch(p, a.data, a.scale, b.data, b.scale, group_sizes, out, (tile, 2))
    for g, exact in enumerate(testing.oracle_m_grouped_gemm_nt_masked(a, b, group_sizes)):
        assert testing.worst_row_error(out[g, : sizes[g]], exact) < GATE_BF16
        assert sizes[g] == m or _is_poison(out[g, sizes[g] :])


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [heuristics.FEW_GROUPS, heuristics.FEW_GROUPS + 1, 1024])
@pytest.mark.parametrize("tile", [heuristics.Tile(128, 256), heuristics.Tile(64, 64)], ids=str)
def test_many_groups(groups, tile):
    """Both lengths of the group table, which leave room for different numbers of stages."""
    ends = testing.ragged_group_ends(40 * groups, groups, seed=2, kind="zipf", device="cuda")
    n, k, rows = 264, 400, 40 * groups
    a, b = _operand(rows, k, "cuda"), _weights(groups, n, k, "cuda")
    exact = testing.oracle_m_grouped_gemm_nt(a, b, ends)
    p = Problem(Grouping.M_GROUPED, Output.BF16, rows, n, k, groups)
    out = _poisoned((rows, n), "cuda")
    gemm._launch(p, a.data, a.scale, b.data, b.scale, ends, out, (tile, 2))
    assert testing.worst_row_error(out, exact) < GATE_BF16


@pytest.mark.gpu
@pytest.mark.parametrize("k", [128, 16384])
def test_long_and_short_contractions(k):
    a, b = _operand(257, k, "cuda"), _weights(1, 520, k, "cuda")
    b = FP8Tensor(b.data[0], b.scale[0])
    out = kernels.gemm_nt(a, b, out=_poisoned((257, 520), "cuda"))
    assert testing.worst_row_error(out, testing.oracle_gemm_nt(a, b)) < GATE_BF16


@pytest.mark.gpu
def test_more_than_2_31_output_elements():
    m, n, k = 300_000, 7168, 128
    a, b = _operand(m, k, "cuda"), _weights(1, n, k, "cuda")
    b = FP8Tensor(b.data[0], b.scale[0])
    out = kernels.gemm_nt(a, b)
    exact = testing.oracle_gemm_nt(FP8Tensor(a.data[-1000:], a.scale[-1000:]), b)
    assert testing.worst_row_error(out[-1000:], exact) < GATE_BF16


@pytest.mark.gpu
def test_a_thousand_repeats_are_bitwise_equal():
    sizes = [129, 0, 511, 64, 3, 777]
    a, b = _operand(sum(sizes), 1024, "cuda"), _weights(6, 768, 1024, "cuda")
    ends = _ends(sizes, "cuda")
    first = kernels.m_grouped_gemm_nt(a, b, ends)
    same = torch.ones((), dtype=torch.bool, device="cuda")
    out = torch.empty_like(first)
    for _ in range(1000):
        kernels.m_grouped_gemm_nt(a, b, ends, out=out)
        same &= (out.view(torch.int16) == first.view(torch.int16)).all()
    assert bool(same)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "ends,text",
    [([100, 50, 200], "non-decreasing"), ([100, 150, 999], "at most 200")],
)
def test_bad_group_ends_are_reported_after_the_fact_and_stay_in_bounds(ends, text):
    import fp8moe

    a, b = _operand(200, 128, "cuda"), _weights(3, 64, 128, "cuda")
    guarded = _poisoned((400, 64), "cuda")
    bad = torch.tensor(ends, dtype=torch.int32, device="cuda")
    kernels.m_grouped_gemm_nt(a, b, bad, out=guarded[:200])
    with pytest.raises(ValueError, match=text):
        fp8moe.check_errors()
    assert _is_poison(guarded[200:])
    fp8moe.check_errors()


@pytest.mark.gpu
def test_captured_in_a_graph_and_replayed_with_other_groups():
    a, b = _operand(512, 256, "cuda"), _weights(4, 264, 256, "cuda")
    ends = _ends([128, 128, 128, 128], "cuda")
    out = torch.empty(512, 264, device="cuda", dtype=torch.bfloat16)
    kernels.m_grouped_gemm_nt(a, b, ends, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.m_grouped_gemm_nt(a, b, ends, out=out)
    ends.copy_(_ends([7, 0, 500, 5], "cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, kernels.m_grouped_gemm_nt(a, b, ends))


# ---------------------------------------------------------------------------------- bad arguments


def _good():
    return _operand(64, 256, "cpu"), _weights(2, 64, 256, "cpu"), _ends([30, 34], "cpu")


@pytest.mark.parametrize(
    "change,text",
    [
        (lambda a, b, e: (FP8Tensor(a.data.float(), a.scale), b, e), "a.data: expected dtype"),
        (lambda a, b, e: (FP8Tensor(a.data, a.scale[:, :1]), b, e), r"a.scale: expected \(64, 2\)"),
        (lambda a, b, e: (FP8Tensor(a.data, a.scale.double()), b, e), "a.scale: expected dtype"),
        (lambda a, b, e: (FP8Tensor(a.data, a.scale.contiguous()), b, e), "MN-major"),
        (lambda a, b, e: (FP8Tensor(a.data.t().contiguous().t(), a.scale), b, e), "contiguous"),
        (lambda a, b, e: (a, FP8Tensor(b.data[:, :, :128].contiguous(), b.scale), e), "K = 256"),
        (lambda a, b, e: (a, FP8Tensor(b.data[:, :60].contiguous(), b.scale), e), "multiple of 8"),
        (lambda a, b, e: (a, FP8Tensor(b.data, b.scale[:, :, :1]), e), "b.scale: expected"),
        (lambda a, b, e: (a, b, e.long()), "group_ends: expected a contiguous 1D int32"),
        (lambda a, b, e: (a, b, e[:1]), "group_ends: expected 2 groups"),
        (lambda a, b, e: (a, b, torch.tensor([40, 30], dtype=torch.int32)), "group_ends"),
        (lambda a, b, e: (a, b, torch.tensor([40, 65], dtype=torch.int32)), "group_ends"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(change, text):
    a, b, ends = change(*_good())
    out = _poisoned((64, 64), "cpu")
    with pytest.raises(ValueError, match=text):
        kernels.m_grouped_gemm_nt(a, b, ends, out=out)
    assert _is_poison(out)


@pytest.mark.parametrize(
    "out,text",
    [
        (torch.empty(64, 63, dtype=torch.bfloat16), "out: expected shape"),
        (torch.empty(64, 64), "out: expected dtype"),
        (torch.empty(64, 65, dtype=torch.bfloat16)[:, 1:], "out: expected a contiguous"),
    ],
)
def test_bad_out(out, text):
    a, b, ends = _good()
    with pytest.raises(ValueError, match=text):
        kernels.m_grouped_gemm_nt(a, b, ends, out=out)


def test_accumulate_needs_a_float32_out():
    a, b, ends = _wgrad_operands([100], 64, 64, "cpu")
    with pytest.raises(ValueError, match="out: expected a float32 tensor"):
        kernels.k_grouped_gemm(a, b, ends, accumulate=True)
    with pytest.raises(ValueError, match="out: expected dtype torch.float32"):
        out = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
        kernels.k_grouped_gemm(a, b, ends, out=out, accumulate=True)


def test_spared_sms_are_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Grouping.DENSE, Output.BF16, 256, 256, 256)
    t = torch.zeros(256, 256, dtype=torch.float8_e4m3fn)
    planned: list[int] = []

    def plan(p: Problem, sms: int) -> None:
        planned.append(sms)
        raise LookupError

    monkeypatch.setattr(gemm, "num_sms", lambda index: 132)
    monkeypatch.setattr(gemm.heuristics, "choose", plan)

    def launch() -> None:
        with pytest.raises(LookupError):
            gemm._launch(problem, t, t, t, t, None, t)

    launch()
    with gemm.sparing_sms(16):
        launch()
        with gemm.sparing_sms(500):
            launch()
        launch()
    with pytest.raises(KeyError), gemm.sparing_sms(16):
        raise KeyError
    launch()
    assert planned == [132, 116, 1, 116, 132]


def test_a_launch_is_prepared_once_for_all_that_it_depends_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once its addresses come again; another problem, tile, number of SMs, tensor or GPU is another
    launch."""
    done: list[str] = []

    class Kernel:
        def __call__(self, *_: object, smem: int) -> None:
            done.append("packed")

        def prepare(self, *_: object, smem: int) -> Callable[[], None]:
            done.append("prepared")
            number = done.count("prepared")
            return lambda: done.append(f"start {number}")

    monkeypatch.setattr(gemm, "_prepared", {})
    monkeypatch.setattr(gemm, "_shape", lambda *_: (Kernel(), 1, 1, 1))
    monkeypatch.setattr(gemm.tma, "tensor_map", lambda *_, **__: None)
    monkeypatch.setattr(gemm.status, "pointer", lambda device: None)
    monkeypatch.setattr(gemm, "num_sms", lambda index: 132)
    problem = Problem(Grouping.M_GROUPED, Output.BF16, 256, 256, 256)
    operands = [torch.zeros(256, 256) for _ in range(6)]
    tile = heuristics.Tile(64, 64)

    def launch(p: Problem = problem, config: object = None, **others: torch.Tensor) -> list[str]:
        done.clear()
        given = [others.get(f"t{i}", t) for i, t in enumerate(operands)]
        gemm._launch(p, *given, config)
        return done[:]

    assert launch() == ["packed"]
    assert launch() == ["prepared", "start 1"] and launch() == ["start 1"]
    assert launch(problem._replace(n=128)) == ["packed"]
    assert launch(problem, (tile, 1)) == ["packed"] and launch(problem, (tile, 2)) == ["packed"]
    with gemm.sparing_sms(16):
        assert launch() == ["packed"]
    for i in range(6):
        assert launch(**{f"t{i}": torch.zeros(256, 256)}) == ["packed"]
    assert launch(t1=operands[1].t()) == ["packed"]  # scales that lie in another way
    with monkeypatch.context() as other_gpu:
        other_gpu.setattr(torch.Tensor, "get_device", lambda t: 1)
        assert launch() == ["packed"]
    assert launch() == ["start 1"]
    monkeypatch.setattr(gemm, "_MAX_PREPARED", len(gemm._prepared))
    assert launch(problem._replace(n=64)) == ["packed"]  # which made room
    assert launch() == ["packed"]
