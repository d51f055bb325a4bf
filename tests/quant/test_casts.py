"""FP8 casts, bit for bit against a numpy implementation; on a GPU they run the kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe import quant
from fp8moe.kernels.fp8tensor import FLOOR_SCALE_POW2, padded_capacity
from fp8moe.testing import GROUP_KINDS, ragged_group_ends, same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 16), (5, 127), (4, 128), (129, 130), (70, 513)]


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Inputs with a special range, the same on every device."""
    x = torch.randn(shape)
    if kind == "wide":
        x *= torch.exp2(torch.randint(-30, 15, shape))
    elif kind == "tiny":
        x *= 1e-38
    elif kind == "around the floor":
        x *= 2.0**-48
    elif kind == "huge":
        x = x.sign() * torch.finfo(dtype).max * torch.rand(shape)
    elif kind == "sparse":
        x *= torch.rand(shape) < 0.01
    elif kind == "rows":
        x *= torch.exp2(torch.randint(-40, 15, (*shape[:-1], 1)))
    return x.to(dtype)


KINDS = ["gaussian", "wide", "tiny", "around the floor", "huge", "sparse", "rows"]


def assert_bits(t: quant.FP8Tensor, data: torch.Tensor, scale: torch.Tensor) -> None:
    assert t.data.dtype == torch.float8_e4m3fn and t.scale.dtype == torch.float32
    assert torch.equal(t.data.view(torch.uint8).cpu(), data)
    assert t.scale.shape == scale.shape
    got = t.scale.cpu().contiguous().view(torch.int32)
    assert torch.equal(got, scale.contiguous().view(torch.int32))


def test_one_wrong_bit_is_seen(oracle: Any) -> None:
    x = make("gaussian", (8, 256), torch.float32)
    t = quant.per_token(x)
    for part in t:
        wrong = quant.FP8Tensor(t.data.clone(), t.scale.clone())
        planted = wrong.data.view(torch.uint8) if part is t.data else wrong.scale.view(torch.int32)
        planted[5, 1] ^= 1
        with pytest.raises(AssertionError):
            assert_bits(wrong, *oracle(x, 1, 128, True))
    assert_bits(t, *oracle(x, 1, 128, True))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_per_token_bits(
    device: Any, oracle: Any, kind: str, dtype: torch.dtype, pow2: bool
) -> None:
    for shape in SHAPES:
        x = make(kind, shape, dtype)
        t = quant.per_token(x.to(device), pow2=pow2)
        assert_bits(t, *oracle(x, 1, 128, pow2))
        assert t.data.is_contiguous()
        assert t.scale.stride() == (1, max(4, -(-shape[0] // 4) * 4))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_per_block_bits(
    device: Any, oracle: Any, kind: str, dtype: torch.dtype, pow2: bool
) -> None:
    for shape in SHAPES:
        x = make(kind, shape, dtype)
        t = quant.per_block(x.to(device), pow2=pow2)
        assert_bits(t, *oracle(x, 128, 128, pow2))
        assert t.data.is_contiguous() and t.scale.is_contiguous()


@pytest.mark.parametrize("pow2", [False, True])
def test_per_block_of_several_experts(device: Any, oracle: Any, pow2: bool) -> None:
    w = make("wide", (3, 140, 200), torch.bfloat16)
    t = quant.per_block(w.to(device), pow2=pow2)
    for g in range(3):
        assert_bits(quant.FP8Tensor(t.data[g], t.scale[g]), *oracle(w[g], 128, 128, pow2))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_per_channel_bits(
    device: Any, oracle: Any, kind: str, dtype: torch.dtype, pow2: bool
) -> None:
    rows, n, groups = 700, 130, 5
    x = make("wide", (rows, n), dtype)
    ends = ragged_group_ends(rows, groups, seed=3, kind=kind)
    t = quant.per_channel(x.to(device), ends.to(device), pow2=pow2)
    capacity = padded_capacity(rows, groups)
    assert t.data.shape == (n, capacity) and t.scale.shape == (n, capacity // 128)
    assert t.data.is_contiguous() and t.scale.stride() == (1, 132)
    start = row = 0
    for end in ends.tolist():
        size = end - row
        stop = start + -(-size // 128) * 128
        group = torch.zeros(stop - start, n)
        group[:size] = x[row:end].float()
        at = quant.FP8Tensor(t.data[:, start:stop], t.scale[:, start // 128 : stop // 128])
        assert_bits(at, *oracle(group.t(), 1, 128, pow2))
        assert not at.data.view(torch.uint8)[:, size:].any()
        start, row = stop, end


@pytest.mark.parametrize("pow2", [False, True])
def test_per_channel_blocks_are_per_block_of_the_transposed(device: Any, pow2: bool) -> None:
    x = make("wide", (512, 300), torch.bfloat16).to(device)
    ends = torch.tensor([128, 512], dtype=torch.int32, device=device)
    t = quant.per_channel(x, ends, pow2=pow2, block=True)
    expected = quant.per_block(x.t().contiguous(), pow2=pow2)
    assert same_bits(t.data[:, :512], expected.data) and t.scale.is_contiguous()
    assert same_bits(t.scale[:, :4], expected.scale)
    # Negative control: one scale for each channel is another cast.
    assert not same_bits(quant.per_channel(x, ends, pow2=pow2).data[:, :512], expected.data)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_non_finite_values_mark_their_block_only(
    device: Any, oracle: Any, bad: float, pow2: bool
) -> None:
    x = torch.randn(256, 256)
    x[130, 5] = bad
    ends = torch.tensor([100, 256], dtype=torch.int32, device=device)
    for t, block in (
        (quant.per_token(x.to(device), pow2=pow2), (1, 128)),
        (quant.per_block(x.to(device), pow2=pow2), (128, 128)),
    ):
        assert_bits(t, *oracle(x, *block, pow2))
        nan = quant.dequantize(t).isnan()
        assert nan[130, :128].all() and nan.sum() == block[0] * block[1]
    t = quant.per_channel(x.to(device), ends, pow2=pow2)
    nan = quant.dequantize(t).isnan()[:, :384]
    # Row 130 is row 30 of the second group, whose first column is 128.
    assert nan[5, 128:256].all() and nan.sum() == 128
    t = quant.per_channel(x.to(device), ends, pow2=pow2, block=True)
    nan = quant.dequantize(t).isnan()[:, :384]
    assert nan[:128, 128:256].all() and nan.sum() == 128 * 128


@pytest.mark.parametrize("pow2", [False, True])
def test_zeros_have_the_smallest_scale(device: Any, pow2: bool) -> None:
    t = quant.per_token(torch.zeros(4, 256, device=device), pow2=pow2)
    assert not t.data.view(torch.uint8).any()
    expected = FLOOR_SCALE_POW2 if pow2 else float(torch.tensor(2.0**-48) / torch.tensor(448.0))
    assert (t.scale == expected).all()
    assert float(t.scale.max()) ** 2 > torch.finfo(torch.float32).tiny


def test_every_code_survives(device: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(2)[: 3 * 128]
    codes[::128] = 0x7E
    for exponent in (-40, 0, 100):
        x = codes.view(torch.float8_e4m3fn).float().view(3, 128) * 2.0**exponent
        t = quant.per_token(x.to(device), pow2=True)
        assert (t.scale == 2.0**exponent).all()
        assert torch.equal(t.data.view(torch.uint8).cpu(), codes.view(3, 128))


def test_ties_go_to_even(device: Any) -> None:
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[:-1] + values[1:]) / 2
    x = torch.cat([torch.tensor([448.0, 0.0]), ties]).view(1, 128)
    code = torch.arange(0x7E)
    expected = torch.where(code % 2 == 0, code, code + 1).to(torch.uint8)
    for sign, high in ((1, 0), (-1, 0x80)):
        t = quant.per_token((x * sign).to(device), pow2=True)
        assert torch.equal(t.data.view(torch.uint8).cpu()[0, 2:], expected + high)


def test_power_of_two_scales_round_up_and_not_further(device: Any) -> None:
    top = torch.tensor([448.0 * 2.0**n for n in (-40, -3, 0, 20)])
    x = torch.zeros(3, 4, 128)
    x[0, :, 7] = top
    x[1, :, 7] = top.nextafter(torch.tensor(math.inf))
    x[2, :, 7] = top.nextafter(torch.tensor(0.0))
    t = quant.per_token(x.view(12, 128).to(device), pow2=True)
    scale = t.scale.cpu().view(3, 4)
    assert torch.equal(scale[0], top / 448)
    assert torch.equal(scale[1], 2 * top / 448)
    assert torch.equal(scale[2], top / 448)
    # 448 is the largest code, reached only without rounding up.
    assert torch.equal(
        t.data[:, 7].float().cpu(), torch.tensor([448.0, 224.0, 448.0]).repeat_interleave(4)
    )


def test_nothing_exceeds_448_and_fp32_scales_reach_it(device: Any) -> None:
    x = torch.randn(2000, 128).exp()
    t = quant.per_token(x.to(device), pow2=False)
    assert (t.data.float().abs().amax(1) == 448).all()
    t = quant.per_token(x.to(device), pow2=True)
    largest = t.data.float().abs().amax(1)
    assert (largest > 223).all() and (largest <= 448).all()


@pytest.mark.parametrize("shape", [(3, 140, 200), (1, 128, 1), (140, 200), (1, 1), (128, 256)])
def test_transposes_are_exact(device: Any, shape: tuple[int, ...]) -> None:
    w = make("wide", shape, torch.bfloat16).to(device)
    for pow2 in (False, True):
        straight, transposed = quant.per_block_both(w, pow2=pow2)
        for a, b in zip(straight, quant.per_block(w, pow2=pow2), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        again = quant.transpose_per_block(straight)
        direct = quant.per_block(w.transpose(-1, -2), pow2=pow2)
        for t in (transposed, again, direct):
            assert t.data.is_contiguous() and t.scale.is_contiguous()
            assert torch.equal(t.data.view(torch.uint8), straight.data.view(torch.uint8).mT)
            assert torch.equal(t.scale, straight.scale.mT)
        assert transposed.data.data_ptr() != straight.data.data_ptr()
        assert again.scale.data_ptr() != straight.scale.data_ptr()


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)])
def test_empty_tensors(device: Any, shape: tuple[int, int]) -> None:
    m, k = shape
    x = torch.empty(shape, device=device)
    t = quant.per_token(x)
    assert t.data.shape == shape and t.scale.shape == (m, -(-k // 128))
    t = quant.per_block(x)
    assert t.data.shape == shape and t.scale.shape == (-(-m // 128), -(-k // 128))
    assert quant.transpose_per_block(t).data.shape == (k, m)
    ends = torch.full((3,), m, dtype=torch.int32, device=device)
    assert quant.per_channel(x, ends).data.shape == (k, padded_capacity(m, 3))


def test_strided_input_is_the_same_as_its_copy(device: Any) -> None:
    base = torch.randn(300, 280, device=device)
    ends = torch.tensor([50, 140], dtype=torch.int32, device=device)
    for x in (base.t(), base[:140, 3:200], base[:140, ::2]):
        for cast in (quant.per_token, quant.per_block):
            a, b = cast(x), cast(x.contiguous())
            assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
            assert torch.equal(a.scale, b.scale)
        a, b = quant.per_channel(x, ends), quant.per_channel(x.contiguous(), ends)
        assert torch.equal(quant.dequantize(a)[:, :256], quant.dequantize(b)[:, :256])


def test_casts_are_detached_and_leave_their_input_alone(device: Any) -> None:
    x = torch.randn(140, 200, device=device, requires_grad=True)
    before = x.detach().clone()
    ends = torch.tensor([140], dtype=torch.int32, device=device)
    both = quant.per_block_both(x)
    for t in (quant.per_token(x), quant.per_block(x), quant.per_channel(x, ends), *both):
        assert not t.data.requires_grad and not t.scale.requires_grad
    assert torch.equal(x, before)


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    columns=st.integers(1, 40),
    pow2=st.booleans(),
)
def test_per_channel_is_per_token_of_the_transpose(
    sizes: list[int], columns: int, pow2: bool
) -> None:
    ends = torch.tensor(sizes).cumsum(0).int()
    x = torch.randn(int(ends[-1]), columns)
    t = quant.per_channel(x, ends, pow2=pow2)
    start = row = 0
    for size in sizes:
        expected = quant.per_token(x[row : row + size].t().contiguous(), pow2=pow2)
        blocks = expected.scale.shape[1]
        assert torch.equal(t.scale[:, start // 128 : start // 128 + blocks], expected.scale)
        got = t.data[:, start : start + size]
        assert torch.equal(got.view(torch.uint8), expected.data.view(torch.uint8))
        start += -(-size // 128) * 128
        row += size
    assert start <= t.data.shape[1]


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_wrong_dtypes(dtype: torch.dtype) -> None:
    x = torch.ones(128, 128).to(dtype)
    ends = torch.tensor([128], dtype=torch.int32)
    message = f"expected torch.bfloat16 or torch.float16 or torch.float32, got {dtype}"
    for call in (
        lambda: quant.per_token(x),
        lambda: quant.per_block(x),
        lambda: quant.per_block_both(x),
        lambda: quant.per_channel(x, ends),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_dimensions() -> None:
    x, y = torch.ones(2, 3, 4), torch.ones(5)
    ends = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"x: expected shape \(M, K\), got \(2, 3, 4\)"):
        quant.per_token(x)
    for cast in (quant.per_block, quant.per_block_both):
        with pytest.raises(ValueError, match=r"w: expected shape \(N, K\) or .*, got \(5,\)"):
            cast(y)
    with pytest.raises(ValueError, match=r"x: expected shape \(R, N\), got \(2, 3, 4\)"):
        quant.per_channel(x, ends)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (torch.tensor([3, 8]), r"group_ends: expected torch.int32, got torch.int64"),
        (
            torch.tensor([[3, 8]], dtype=torch.int32),
            r"group_ends: expected shape \(E\), got \(1, 2\)",
        ),
        (torch.tensor([5, 3], dtype=torch.int32), r"group_ends\[1\] = 3 after 5"),
        (torch.tensor([-1, 3], dtype=torch.int32), r"group_ends\[0\] = -1 after 0"),
        (torch.tensor([3, 9], dtype=torch.int32), r"at most 8 .*group_ends\[1\] = 9"),
        (torch.empty(2, dtype=torch.int32, device="meta"), r"group_ends: expected a tensor on cpu"),
    ],
)
def test_wrong_group_ends(ends: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quant.per_channel(torch.randn(8, 16), ends)


def test_wrong_transposes() -> None:
    w = quant.per_block(torch.randn(130, 200))
    for bad, message in (
        (quant.FP8Tensor(w.data.float(), w.scale), r"w.data: expected dtype .*got torch.float32"),
        (quant.FP8Tensor(w.data, w.scale.half()), r"scale: expected torch.float32"),
        (
            quant.FP8Tensor(w.data, w.scale[:1]),
            r"scale: expected shape \(1, 2, 2\), got \(1, 1, 2\)",
        ),
        (quant.FP8Tensor(w.data, w.scale[0]), r"w.scale: expected 2 dimensions .*got \(2,\)"),
        (quant.FP8Tensor(w.data[0], w.scale), r"w.data: expected shape \(N, K\) or .*\(200,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            quant.transpose_per_block(bad)
