"""The reference GEMMs against FP64 on the same FP8 inputs, and what the gate catches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe import quant, testing
from fp8moe.kernels import reference
from fp8moe.testing import BF16_ROW_ERROR, FP32_ROW_ERROR, GROUP_KINDS, worst_row_error

GATES = {torch.bfloat16: BF16_ROW_ERROR, torch.float32: FP32_ROW_ERROR}


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return testing.poison(torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (130, 264, 208), (65, 128, 384), (0, 8, 16)])
def test_gemm_nt(dtype, pow2, m, n, k) -> None:
    a = quant.per_token(torch.randn(m, k), pow2=pow2)
    b = quant.per_block(torch.randn(n, k), pow2=pow2)
    out = poisoned(m, n, dtype=dtype)
    reference.gemm_nt(*a, *b, out)
    assert worst_row_error(out, testing.oracle_gemm_nt(a, b)) < GATES[dtype]


def test_gemm_nt_with_one_row_of_b() -> None:
    a, b = quant.per_token(torch.randn(5, 300)), quant.per_block(torch.randn(1, 300))
    out = poisoned(5, 1, dtype=torch.float32)
    reference.gemm_nt(*a, *b, out)
    # A row is one sum here, so it may cancel: compare the column.
    assert worst_row_error(out.t(), testing.oracle_gemm_nt(a, b).t()) < FP32_ROW_ERROR


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_m_grouped_gemm_nt(kind: str, dtype: torch.dtype) -> None:
    m, n, k, e = 300, 136, 208, 5
    ends = testing.ragged_group_ends(m, e, seed=0, kind=kind)
    a, b = quant.per_token(torch.randn(m, k)), quant.per_block(torch.randn(e, n, k))
    out = poisoned(m, n, dtype=dtype)
    reference.m_grouped_gemm_nt(*a, *b, ends, out)
    used = int(ends[-1])
    assert worst_row_error(out[:used], testing.oracle_m_grouped_gemm_nt(a, b, ends)) < GATES[dtype]
    assert out[used:].isnan().all()


def test_m_grouped_gemm_nt_masked() -> None:
    e, m, n, k = 4, 60, 136, 208
    sizes = torch.tensor([0, 60, 1, 33], dtype=torch.int32)
    x = torch.randn(e * m, k)
    flat = quant.per_token(x)
    a = quant.FP8Tensor(flat.data.view(e, m, k), flat.scale.reshape(e, m, -1))
    b = quant.per_block(torch.randn(e, n, k))
    out = poisoned(e, m, n)
    reference.m_grouped_gemm_nt_masked(*a, *b, sizes, out)
    oracle = testing.oracle_m_grouped_gemm_nt_masked(a, b, sizes)
    for g, size in enumerate(sizes.tolist()):
        assert worst_row_error(out[g, :size], oracle[g]) < BF16_ROW_ERROR
        assert out[g, size:].isnan().all()


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_k_grouped_gemm(kind: str, accumulate: bool, dtype: torch.dtype) -> None:
    r, n, k, e = 400, 72, 136, 5
    ends = testing.ragged_group_ends(r, e, seed=0, kind=kind)
    a = quant.per_channel(torch.randn(r, n), ends)
    b = quant.per_channel(torch.randn(r, k), ends, block=True)
    expected = testing.oracle_k_grouped_gemm(a, b, ends)
    out = poisoned(e, n, k, dtype=dtype)
    if accumulate:
        out = torch.randn(e, n, k).to(dtype)
        expected += out.double()
    reference.k_grouped_gemm(*a, *b, ends, out, accumulate)
    assert worst_row_error(out, expected) < GATES[dtype]


@given(
    sizes=st.lists(st.integers(0, 260), min_size=1, max_size=5),
    slack=st.integers(0, 5),
    n=st.integers(1, 4),
)
def test_grouped_gemms_are_gemms_of_each_group(sizes: list[int], slack: int, n: int) -> None:
    n, k, e = 8 * n, 48, len(sizes)
    ends = torch.tensor(sizes).cumsum(0).int()
    rows = int(ends[-1]) + slack
    x, y, w = torch.randn(rows, k), torch.randn(rows, n), torch.randn(e, n, k)
    a, b = quant.per_token(x), quant.per_block(w)
    forward = poisoned(rows, n, dtype=torch.float32)
    reference.m_grouped_gemm_nt(*a, *b, ends, forward)
    a_t, b_t = quant.per_channel(y, ends), quant.per_channel(x, ends, block=True)
    wgrad = poisoned(e, n, k, dtype=torch.float32)
    reference.k_grouped_gemm(*a_t, *b_t, ends, wgrad, False)
    row = 0
    for g, size in enumerate(sizes):
        at = slice(row, row + size)
        single = poisoned(size, n, dtype=torch.float32)
        reference.gemm_nt(a.data[at], a.scale[at], b.data[g], b.scale[g], single)
        assert torch.allclose(forward[at], single, rtol=1e-5, atol=1e-5)
        u = quant.dequantize(quant.per_token(y[at].t().contiguous()))
        v = quant.dequantize(quant.per_block(x[at].t().contiguous())) if size else x[at].t()
        assert torch.allclose(wgrad[g], u @ v.t(), rtol=1e-5, atol=1e-4)
        if size == 0:
            assert not wgrad[g].any()
        row += size
    assert forward[row:].isnan().all()


@pytest.mark.parametrize("pow2", [False, True])
def test_quality_on_gaussian_data(pow2: bool) -> None:
    m, n, k, e = 512, 128, 512, 4
    ends = testing.ragged_group_ends(m, e, seed=0)
    x, w, g = torch.randn(m, k), torch.randn(e, n, k), torch.randn(m, n)
    out = torch.empty(m, n, dtype=torch.bfloat16)
    a, b = quant.per_token(x, pow2=pow2), quant.per_block(w, pow2=pow2)
    reference.m_grouped_gemm_nt(*a, *b, ends, out)
    group = torch.bucketize(torch.arange(m), ends, right=True)
    exact = torch.einsum("mk,mnk->mn", x.double(), w.double()[group])
    assert testing.sqnr_db(out, exact) >= testing.SQNR_FORWARD_DB
    dw = torch.empty(e, n, k)
    a_t = quant.per_channel(g, ends, pow2=pow2)
    b_t = quant.per_channel(x, ends, pow2=pow2, block=True)
    reference.k_grouped_gemm(*a_t, *b_t, ends, dw, False)
    one_hot = torch.nn.functional.one_hot(group, e).double()
    exact = torch.einsum("me,mn,mk->enk", one_hot, g.double(), x.double())
    assert testing.sqnr_db(dw, exact) >= testing.SQNR_GRADIENT_DB
    # Negative control: one bit less of mantissa in one operand fails the gate.
    coarse = quant.FP8Tensor((a.data.view(torch.uint8) & 0xFE).view(torch.float8_e4m3fn), a.scale)
    reference.m_grouped_gemm_nt(*coarse, *b, ends, out)
    exact = torch.einsum("mk,mnk->mn", x.double(), w.double()[group])
    assert testing.sqnr_db(out, exact) < testing.SQNR_FORWARD_DB


class TestTheGateRejects:
    """Planted errors that `worst_row_error` must not let through."""

    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.m, self.n, self.k, self.e = 4096, 64, 256, 4
        self.ends = torch.tensor([1000, 2000, 3000, 4096], dtype=torch.int32)
        self.a = quant.per_token(torch.randn(self.m, self.k))
        self.b = quant.per_block(torch.randn(self.e, self.n, self.k))
        self.oracle = testing.oracle_m_grouped_gemm_nt(self.a, self.b, self.ends)

    def run(self, a: quant.FP8Tensor, b: quant.FP8Tensor, ends: torch.Tensor) -> torch.Tensor:
        out = poisoned(self.m, self.n)
        reference.m_grouped_gemm_nt(*a, *b, ends, out)
        return out

    def test_and_passes_what_is_right(self) -> None:
        out = self.run(self.a, self.b, self.ends)
        assert worst_row_error(out, self.oracle) < BF16_ROW_ERROR

    def test_a_zeroed_row_which_the_usual_similarity_passes(self) -> None:
        out = self.run(self.a, self.b, self.ends)
        out[1234] = 0
        assert worst_row_error(out, self.oracle) > BF16_ROW_ERROR
        assert testing.similarity_error(out, self.oracle) < 1e-3

    def test_an_end_that_is_off_by_one(self) -> None:
        ends = self.ends + torch.tensor([0, 1, 0, 0], dtype=torch.int32)
        out = self.run(self.a, self.b, ends)
        assert worst_row_error(out, self.oracle) > BF16_ROW_ERROR
        assert testing.similarity_error(out, self.oracle) < 1e-3

    def test_scales_of_the_neighbouring_row(self) -> None:
        a = quant.FP8Tensor(self.a.data, self.a.scale.roll(1, 0))
        assert worst_row_error(self.run(a, self.b, self.ends), self.oracle) > BF16_ROW_ERROR

    def test_scales_of_the_neighbouring_block(self) -> None:
        b = quant.FP8Tensor(self.b.data, self.b.scale * torch.tensor([1.0, 1.01]))
        assert worst_row_error(self.run(self.a, b, self.ends), self.oracle) > BF16_ROW_ERROR

    def test_two_swapped_groups(self) -> None:
        order = torch.tensor([0, 2, 1, 3])
        data = self.b.data.view(torch.uint8)[order].view(torch.float8_e4m3fn)
        b = quant.FP8Tensor(data, self.b.scale[order])
        assert worst_row_error(self.run(self.a, b, self.ends), self.oracle) > BF16_ROW_ERROR

    def test_one_missing_product(self) -> None:
        out = self.run(self.a, self.b, self.ends)
        x, w = testing.exact(self.a), testing.exact(self.b)
        out[7] -= (x[7, 0] * w[0, :, 0]).to(out.dtype)
        assert worst_row_error(out, self.oracle) > BF16_ROW_ERROR


def test_non_finite_input_is_visible_in_its_rows_only() -> None:
    x, w = torch.randn(10, 256), torch.randn(2, 16, 256)
    x[3, 200] = float("inf")
    ends = torch.tensor([5, 10], dtype=torch.int32)
    out = poisoned(10, 16)
    reference.m_grouped_gemm_nt(*quant.per_token(x), *quant.per_block(w), ends, out)
    assert out[3].isnan().all() and out.isnan().sum() == 16


@pytest.mark.parametrize("sizes", [[-1, 3], [3, 61]])
def test_masked_sizes_out_of_range_are_named_before_anything_is_written(sizes: list[int]) -> None:
    flat = quant.per_token(torch.randn(120, 32))
    out = poisoned(2, 60, 8)
    with pytest.raises(ValueError, match=r"group_sizes: expected 0 <= size <= 60"):
        reference.m_grouped_gemm_nt_masked(
            flat.data.view(2, 60, 32),
            flat.scale.reshape(2, 60, 1),
            *quant.per_block(torch.randn(2, 8, 32)),
            torch.tensor(sizes, dtype=torch.int32),
            out,
        )
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("ends", "message"), [([5, 3], "after 5"), ([3, 11], "at most 10"), ([-2, 3], "= -2 after 0")]
)
def test_group_ends_are_checked_before_anything_is_written(ends: list[int], message: str) -> None:
    a, b = quant.per_token(torch.randn(10, 32)), quant.per_block(torch.randn(2, 8, 32))
    out = poisoned(10, 8)
    with pytest.raises(ValueError, match=message):
        reference.m_grouped_gemm_nt(*a, *b, torch.tensor(ends, dtype=torch.int32), out)
    assert out.isnan().all()
