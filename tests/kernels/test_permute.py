"""Row movements on both devices: bit-equal to the reference, whatever the input."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8moe.kernels import permute, reference
from fp8moe.kernels.fp8tensor import FLOOR_SCALE_POW2, FP8_DTYPE, empty_scale

Tensors = tuple[torch.Tensor, ...]

# (T, K, E, H): one token, odd column blocks, empty experts, many experts.
SHAPES = [(1, 1, 1, 128), (40, 2, 3, 128), (150, 2, 4, 384), (100, 8, 40, 256)]
LONG = (25000, 1, 2, 128)

KINDS = ("gaussian", "masked", "near", "spread", "quiet columns", "non-finite")


# -------------------------------------------------------------------------------------- ingredients


def to_device(scale: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` that stays MN-major."""
    out = empty_scale(*scale.shape, device=device)
    return out.copy_(scale)


def topk_ids(tokens: int, topk: int, experts: int) -> torch.Tensor:
    """Random ids, some of which drop their slot."""
    return torch.randint(0, experts + 1, (tokens, topk))


def fp8_input(tokens: int, hidden: int, kind: str, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """data (T, H) and scale (T, H/128), per_token."""
    x = torch.randn(tokens, hidden)
    if kind == "masked":
        x[::3] = 0
    elif kind == "near":  # row scales within reach of packed f16
        x *= torch.exp2(torch.randint(-14, 1, (tokens, 1)).float())
    elif kind == "spread":  # out of its reach, up to 2**60 apart
        x *= torch.exp2(torch.randint(-30, 31, (tokens, 1)).float())
    elif kind == "quiet columns":
        x *= torch.exp2(torch.randint(-25, 1, (1, hidden)).float())
    elif kind == "non-finite":
        x[0, 3] = float("nan")
        x[tokens // 2, hidden // 2] = float("-inf")
        x[::7] *= 2.0**-60
        x[:, ::5] = 0
    return reference.cast_per_token(x.bfloat16(), pow2)


def used_rows(slot_of_row: torch.Tensor) -> int:
    return int((slot_of_row != -2).sum())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, NaN equal to NaN; bytes for FP8."""
    a, b = a.cpu(), b.cpu()
    if a.dtype == FP8_DTYPE:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    equal = a == b
    if a.is_floating_point():
        equal |= a.isnan() & b.isnan()
    return a.dtype == b.dtype and a.shape == b.shape and bool(equal.all())


def rows_used(out: Tensors, used: int) -> Tensors:
    """(data, scale) without the rows past the last group."""
    return out[0][:used], out[1][:used]


def columns_used(out: Tensors, used: int) -> Tensors:
    """(data_t, scale_t) without the columns past the last group."""
    return out[0][:, :used], out[1][:, : used // 128]


def assert_same(got: Tensors, expected: Tensors) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same(a, b), f"output {i} differs"


# ------------------------------------------------------------------------------------ row movements


@pytest.mark.parametrize(
    ("shape", "hidden"), [(s, h) for s in SHAPES for h in (8, 48, 1096)] + [(LONG, 136)], ids=str
)
def test_permute_rows(device: torch.device, shape: tuple[int, ...], hidden: int) -> None:
    tokens, topk, experts, _ = shape
    row_of_slot, slot_of_row, _, _ = reference.route(topk_ids(tokens, topk, experts), experts)
    x = torch.randn(tokens, hidden).bfloat16()
    used = used_rows(slot_of_row)
    got = permute.permute_rows(x.to(device), row_of_slot.to(device), slot_of_row.to(device))
    assert got.shape == (len(slot_of_row), hidden)
    assert same(got[:used], reference.permute_rows(x, row_of_slot, slot_of_row)[:used])


@pytest.mark.parametrize(
    ("shape", "kind"), [(s, k) for s in SHAPES for k in KINDS] + [(LONG, "near")], ids=str
)
@pytest.mark.parametrize("pow2_in", [True, False], ids=["from pow2", "from amax"])
def test_fp8_movements(
    device: torch.device, shape: tuple[int, ...], kind: str, pow2_in: bool
) -> None:
    tokens, topk, experts, hidden = shape
    row_of_slot, slot_of_row, _, _ = reference.route(topk_ids(tokens, topk, experts), experts)
    used = used_rows(slot_of_row)
    data, scale = fp8_input(tokens, hidden, kind, pow2_in)
    x8 = (data.to(device), to_device(scale, device))
    maps = (row_of_slot.to(device), slot_of_row.to(device))
    args = (*x8, maps[1], topk)

    expected_rows = rows_used(reference.permute_fp8(data, scale, row_of_slot, slot_of_row), used)
    assert_same(rows_used(permute.permute_fp8(*x8, *maps), used), expected_rows)
    for pow2 in (True, False):
        expected = reference.permute_fp8_to_channel(data, scale, slot_of_row, topk, pow2, False)
        expected = columns_used(expected, used)
        got = permute.permute_fp8_to_channel(*args, pow2, False)
        assert got[1].stride() == empty_scale(*got[1].shape).stride()
        assert_same(columns_used(got, used), expected)
        blocks = permute.permute_fp8_to_channel(*args, pow2, True)
        assert blocks[1].is_contiguous() and blocks[1].shape[0] == hidden // 128
        wanted = reference.permute_fp8_to_channel(data, scale, slot_of_row, topk, pow2, True)
        assert_same(columns_used(blocks, used), columns_used(wanted, used))
        both = permute.permute_fp8_both(*args, pow2)
        assert_same(rows_used(both[:2], used), expected_rows)
        assert_same(columns_used(both[2:], used), expected)


@given(data=st.data())
def test_any_row_scales_convert_exactly(device: torch.device, data: Any) -> None:
    """Around the limits of packed f16: rows 2**15 apart, columns that only quiet rows fill."""
    base = data.draw(st.integers(-80, 60))
    limit = data.draw(st.integers(13, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    shift = random(0, limit, 128, 1)
    shift[: data.draw(st.integers(0, 128))] = 0
    scale = torch.exp2((base - shift).float())
    data8 = random(0, 256, 128, 128)
    data8[random(0, 3, 128) == 0] &= 0x87  # rows of subnormals and zeros
    data8[data8 & 0x7F == 0x7F] = 0
    data8[shift < random(0, limit, 128)] = 0  # [row, column]: loud rows leave some columns alone
    data8 = data8.to(torch.uint8).view(FP8_DTYPE)
    _, slot_of_row, _, _ = reference.route(torch.zeros((128, 1), dtype=torch.int64), 1)
    args = (data8.to(device), to_device(scale, device), slot_of_row.to(device), 1)
    for block in (False, True):
        got = permute.permute_fp8_to_channel(*args, True, block)
        expected = reference.permute_fp8_to_channel(data8, scale, slot_of_row, 1, True, block)
        assert_same(got, expected)


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
@pytest.mark.parametrize("base", [-120, -60, -56, -20, 0, 117, 118, 119, 120, 121])
def test_blocks_of_any_row_scales(device: torch.device, base: int, pow2: bool) -> None:
    """Every byte, 2**0 to 2**-63 below 2**base: where factors leave f16 and products FP32."""
    for factor in (1.0, 1.0 + 2.0**-23, 1.9):
        scale = torch.exp2((base - torch.arange(128) // 2).double()).float()[:, None] * factor
        scale[7:9] = 0.0
        order = torch.stack([torch.randperm(256)[:128] for _ in range(128)])
        data = order.to(torch.uint8).view(FP8_DTYPE)
        slot_of_row = torch.randperm(128).int()
        slot_of_row[torch.rand(128) < 0.1] = -1
        expected = reference.permute_fp8_to_channel(data, scale, slot_of_row, 1, pow2, True)
        got = permute.permute_fp8_to_channel(
            data.to(device), to_device(scale, device), slot_of_row.to(device), 1, pow2, True
        )
        assert_same(got, expected)


def test_a_bad_row_stays_in_its_blocks(device: torch.device) -> None:
    """A NaN token spoils its own row block, and in the transposed copy its 128 x 1 blocks."""
    tokens, hidden = 300, 256
    ids = (torch.arange(tokens) // 150)[:, None]
    _, slot_of_row, _, _ = reference.route(ids, 2)
    x = torch.randn(tokens, hidden)
    x[140, 7] = float("nan")  # row 140: the second row block, columns 0 to 127
    data, scale = reference.cast_per_token(x.bfloat16(), True)
    _, rows_scale, data_t, scale_t = permute.permute_fp8_both(
        data.to(device), to_device(scale, device), slot_of_row.to(device), 1, True
    )
    bad = rows_scale.isnan().nonzero().tolist()
    assert bad == [[140, 0]]
    expected = torch.zeros((hidden, 4), dtype=torch.bool)
    expected[:128, 1] = True
    assert torch.equal(scale_t[:, :4].isnan().cpu(), expected)
    blocks = data_t[:, :512].view(torch.uint8).view(hidden, 4, 128).cpu()
    assert torch.equal((blocks == 0x7F).all(2), expected)


def test_padding_is_zero_with_the_floor_scale(device: torch.device) -> None:
    _, slot_of_row, _, _ = reference.route(torch.zeros((5, 1), dtype=torch.int64), 2)
    data, scale = fp8_input(5, 128, "gaussian", False)
    rows, rows_scale, data_t, _ = permute.permute_fp8_both(
        data.to(device), to_device(scale, device), slot_of_row.to(device), 1, True
    )
    assert not rows[5:128].view(torch.uint8).any()
    assert not data_t[:, 5:128].view(torch.uint8).any()
    assert (rows_scale[5:128] == FLOOR_SCALE_POW2).all()


def test_gather_sum_of_permuted_rows_is_k_times_x(device: torch.device) -> None:
    tokens, topk = 200, 4
    ids = torch.randint(0, 6, (tokens, topk), device=device)
    row_of_slot, slot_of_row, _, _ = permute.route(ids, 6)
    x = torch.randn(tokens, 64, device=device).bfloat16()
    rows = permute.permute_rows(x, row_of_slot, slot_of_row)
    assert torch.equal(permute.gather_sum(rows, row_of_slot), topk * x)


def test_two_runs_are_equal(device: torch.device) -> None:
    ids = topk_ids(900, 4, 20).to(device)
    data, scale = fp8_input(900, 256, "near", True)
    data, scale = data.to(device), to_device(scale, device)

    def run() -> Tensors:
        row_of_slot, slot_of_row, group_ends, counts = permute.route(ids, 20)
        used = used_rows(slot_of_row)
        both = permute.permute_fp8_both(data, scale, slot_of_row, 4, True)
        rows = both[0].view(torch.uint8)[:, :256].bfloat16()
        rows[used:] = 0
        out = permute.gather_sum(rows, row_of_slot)
        fp8 = rows_used(both[:2], used) + columns_used(both[2:], used)
        return (row_of_slot, slot_of_row, group_ends, counts, out, *fp8)

    assert_same(run(), run())


@pytest.mark.parametrize("planted", ["byte", "swapped rows", "stale padding", "scale"])
def test_a_planted_error_is_noticed(planted: str) -> None:
    row_of_slot, slot_of_row, _, _ = reference.route(topk_ids(40, 2, 3), 3)
    used = used_rows(slot_of_row)
    data, scale = fp8_input(40, 128, "gaussian", True)
    expected = rows_used(reference.permute_fp8(data, scale, row_of_slot, slot_of_row), used)
    rows, rows_scale = (t.clone() for t in expected)
    bytes_ = rows.view(torch.uint8)
    if planted == "byte":
        bytes_[7, 9] ^= 1
    elif planted == "swapped rows":
        bytes_[:2] = bytes_[:2].flip(0)
    elif planted == "stale padding":
        bytes_[(slot_of_row[:used] == -1).nonzero()[0], 3] = 1
    else:
        rows_scale[5, 0] = 2 * rows_scale[5, 0]
    with pytest.raises(AssertionError, match="differs"):
        assert_same((rows, rows_scale), expected)


# ----------------------------------------------------------------------------- shapes and bad input


def test_fake_outputs_match_real_ones() -> None:
    ids = topk_ids(50, 2, 3)
    row_of_slot, slot_of_row, _, _ = reference.route(ids, 3)
    data, scale = fp8_input(50, 256, "gaussian", True)
    rows = torch.randn(len(slot_of_row), 256).bfloat16()
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (permute.route, (ids, 3)),
        (permute.permute_rows, (torch.randn(50, 16).bfloat16(), row_of_slot, slot_of_row)),
        (permute.permute_fp8, (data, scale, row_of_slot, slot_of_row)),
        (permute.permute_fp8_to_channel, (data, scale, slot_of_row, 2, True, False)),
        (permute.permute_fp8_to_channel, (data, scale, slot_of_row, 2, True, True)),
        (permute.permute_fp8_both, (data, scale, slot_of_row, 2, True)),
        (permute.gather_sum, (rows, row_of_slot)),
        (permute.gather_slots, (torch.randn(2, len(slot_of_row)), row_of_slot)),
    ]
    for call, args in calls:
        real = call(*args)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = call(*fakes)
        real, fake = (t if isinstance(t, tuple) else (t,) for t in (real, fake))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), call


SLOTS = torch.full((128,), -2, dtype=torch.int32)
DATA = torch.zeros((4, 256), dtype=torch.uint8).view(FP8_DTYPE)
SCALE = empty_scale(4, 2).fill_(1.0)
ROWS = torch.zeros((128, 16), dtype=torch.bfloat16)
MAP = torch.zeros((128, 2), dtype=torch.int32)

BAD_CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "x dtype": (permute.permute_rows, (ROWS.float(), MAP, SLOTS), "x: expected torch.bfloat16"),
    "x width": (
        permute.permute_rows,
        (ROWS[:, :7].contiguous(), MAP, SLOTS),
        "multiple of 8, got 7",
    ),
    "map length": (permute.permute_rows, (ROWS, MAP, SLOTS[:100]), "multiple of 128 rows"),
    "map dtype": (
        permute.permute_rows,
        (ROWS, MAP, SLOTS.long()),
        "slot_of_row: expected torch.int",
    ),
    "map tokens": (permute.permute_rows, (ROWS, MAP[:9], SLOTS), r"row_of_slot: .*\(128, K\)"),
    "topk": (
        permute.permute_fp8_both,
        (DATA, SCALE, SLOTS, 0, True),
        "topk: expected at least 1, got 0",
    ),
    "data dtype": (permute.permute_fp8, (ROWS, SCALE, MAP, SLOTS), "data: expected torch.float8"),
    "data width": (
        permute.permute_fp8,
        (DATA.view(torch.uint8)[:, :100].contiguous().view(FP8_DTYPE), SCALE, MAP, SLOTS),
        "data: H: expected a multiple of 128, got 100",
    ),
    "scale shape": (
        permute.permute_fp8,
        (DATA, SCALE[:, :1], MAP, SLOTS),
        r"scale: expected \(4, 2\) for data \(4, 256\), got \(4, 1\)",
    ),
    "data stride": (
        permute.permute_fp8_both,
        (torch.zeros(4, 264).to(DATA.dtype)[:, :256], SCALE, SLOTS, 2, True),
        "data: expected a contiguous tensor",
    ),
    "scale dtype": (
        permute.permute_fp8_to_channel,
        (DATA, SCALE.double(), SLOTS, 2, True, True),
        "scale: expected torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case: str) -> None:
    call, args, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(*args)


@pytest.mark.parametrize("value", [*range(1, 40), 64, 1000, 65536, (1 << 31) - 1])
def test_division_by_multiplication(value: int) -> None:
    multiplier, shift = permute.divisor(value)
    assert isinstance(multiplier, ctypes.c_uint32)
    edges = {0, 1, (1 << 31) - 1, (1 << 31) // value * value - 1}
    edges |= {k * value + d for k in (1, 2, 1000, (1 << 31) // value - 1) for d in (-1, 0, 1)}
    edges |= set(torch.randint(0, 1 << 31, (500,)).tolist())
    for n in edges:
        if 0 <= n < 1 << 31:
            got = n if multiplier.value == 0 else (n * multiplier.value >> 32) >> shift
            assert got == n // value, n
