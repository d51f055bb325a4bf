"""The gates themselves: what they pass, what they catch, and the makers of inputs."""

from __future__ import annotations

import math

import pytest
import torch

from fp8moe import quant, testing


@pytest.fixture
def reference() -> torch.Tensor:
    return torch.randn(2048, 64, dtype=torch.float64)


def test_worst_row_error_of_bf16_rounding_passes(reference: torch.Tensor) -> None:
    error = testing.worst_row_error(reference.bfloat16(), reference)
    assert 5e-4 < error < testing.BF16_ROW_ERROR
    assert testing.worst_row_error(reference, reference) == 0


def test_a_zeroed_row_fails_here_and_passes_the_usual_similarity(reference: torch.Tensor) -> None:
    out = reference.clone()
    out[1000] = 0
    assert testing.worst_row_error(out, reference) == 1.0
    assert testing.similarity_error(out, reference) < 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_infinitely_wrong(reference: torch.Tensor, value: float) -> None:
    out = reference.clone()
    out[3, 5] = value
    assert testing.worst_row_error(out, reference) == math.inf
    assert testing.worst_row_error(reference, out) == math.inf
    assert testing.sqnr_db(out, reference) == -math.inf


def test_rows_with_a_zero_reference() -> None:
    ref = torch.zeros(3, 8)
    ref[1] = 1
    assert testing.worst_row_error(ref.clone(), ref) == 0
    out = ref.clone()
    out[2, 7] = 1e-30
    assert testing.worst_row_error(out, ref) == math.inf


def test_worst_row_error_of_nothing_and_of_another_shape() -> None:
    assert testing.worst_row_error(torch.empty(0, 8), torch.empty(0, 8)) == 0
    with pytest.raises(ValueError, match=r"out: expected \(2, 8\) as ref, got \(8,\)"):
        testing.worst_row_error(torch.ones(8), torch.ones(2, 8))


def test_sqnr() -> None:
    ref = torch.ones(1000)
    assert testing.sqnr_db(ref * 1.01, ref) == pytest.approx(40, abs=0.01)
    assert testing.sqnr_db(ref, ref) == math.inf
    assert testing.sqnr_db(ref, torch.zeros(1000)) == -math.inf


@pytest.mark.parametrize("kind", testing.GROUP_KINDS)
@pytest.mark.parametrize(("total", "num_groups"), [(0, 4), (1, 1), (1000, 8), (5000, 3)])
def test_ragged_group_ends(kind: str, total: int, num_groups: int) -> None:
    ends = testing.ragged_group_ends(total, num_groups, seed=1, kind=kind)
    assert torch.equal(ends, testing.ragged_group_ends(total, num_groups, seed=1, kind=kind))
    assert ends.dtype == torch.int32 and ends.shape == (num_groups,)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    assert (sizes >= 0).all()
    if kind == "slack":
        assert ends[-1] == total * 3 // 4
    elif kind == "aligned":
        assert ends[-1] == total // 128 * 128 and (sizes % 128 == 0).all()
    else:
        assert ends[-1] == total
    if kind == "one_hot":
        assert (sizes > 0).sum() == min(total, 1)
    if kind == "unaligned" and total > 1000:
        assert (sizes[:-1] % 128 != 0).all()
    if kind.startswith("empty_") and num_groups > 1:
        assert sizes[{"first": 0, "last": -1, "middle": num_groups // 2}[kind[6:]]] == 0


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one_hot"])
def test_random_topk(kind: str) -> None:
    ids, weights = testing.random_topk(300, 3, 7, seed=0, kind=kind)
    assert ids.shape == weights.shape == (300, 3)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert 0 <= ids.min() and ids.max() < 7
    assert torch.allclose(weights.sum(1), torch.ones(300))
    counts = torch.bincount(ids.flatten(), minlength=7)
    if kind == "one_hot":
        assert counts.tolist() == [300, 300, 300, 0, 0, 0, 0]
    if kind == "zipf":
        assert counts[0] > 2 * counts[6]
    dropped, _ = testing.random_topk(300, 3, 7, seed=0, kind=kind, dropped=0.5)
    assert 0.4 < (dropped == 7).float().mean() < 0.6


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="kind: expected one of uniform, .*, got 'even'"):
        testing.ragged_group_ends(10, 2, seed=0, kind="even")
    with pytest.raises(ValueError, match="kind: expected uniform, .*, got 'even'"):
        testing.random_topk(10, 2, 4, seed=0, kind="even")


def test_poison() -> None:
    assert testing.poison(torch.zeros(3)).isnan().all()
    assert testing.poison(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert testing.poison(torch.zeros(3).to(torch.float8_e4m3fn)).float().isnan().all()
    assert testing.poison(torch.zeros(3, dtype=torch.int32)).tolist() == [-(2**31)] * 3
    assert testing.poison(torch.zeros(4, dtype=torch.uint8)).tolist() == [0x7F] * 4


def test_exact_agrees_with_dequantize_for_powers_of_two() -> None:
    x = torch.randn(2, 200, 300)
    for t in (quant.per_block(x), quant.per_token(x[0]), quant.per_block(x[1])):
        assert torch.equal(testing.exact(t), quant.dequantize(t).double())


def test_oracles_agree_with_each_other() -> None:
    ends = testing.ragged_group_ends(300, 3, seed=2)
    a, w = torch.randn(300, 256), torch.randn(3, 64, 256)
    a8, w8 = quant.per_token(a), quant.per_block(w)
    out = testing.oracle_m_grouped_gemm_nt(a8, w8, ends)
    start = 0
    for g, end in enumerate(ends.tolist()):
        expected = testing.exact(a8)[start:end] @ testing.exact(w8)[g].t()
        assert torch.allclose(out[start:end], expected, rtol=1e-12, atol=0)
        start = end

    x, y = torch.randn(300, 64), torch.randn(300, 128)
    x8, y8 = quant.per_channel(x, ends), quant.per_channel(y, ends, block=True)
    d = testing.oracle_k_grouped_gemm(x8, y8, ends)
    start = 0
    for g, end in enumerate(ends.tolist()):
        expected = x[start:end].double().t() @ y[start:end].double()
        assert testing.sqnr_db(d[g], expected) > testing.SQNR_FORWARD_DB
        start = end


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without a GPU")
def test_timers_need_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="kernel timers: expected a CUDA GPU, found none"):
        testing.time_kernel_us(lambda: None)
    with pytest.raises(RuntimeError, match="kernel timers"):
        testing.sustained_us(lambda: None)


@pytest.mark.gpu
def test_timers_on_a_copy() -> None:
    x = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    for timer in (testing.time_kernel_us, testing.sustained_us):
        us = timer(lambda: y.copy_(x))
        assert 1e12 < 2 * x.numel() / (us * 1e-6) < 6e12


def test_same_bits_tells_zeros_apart_and_equates_nans():
    x = torch.tensor([0.0, math.nan, 1.5])
    assert testing.same_bits(x, x.clone())
    assert not testing.same_bits(x, torch.tensor([-0.0, math.nan, 1.5]))
    assert not testing.same_bits(x, x[:2])
    data = x.to(torch.float8_e4m3fn)
    assert testing.same_bits(data, data.view(torch.uint8))
