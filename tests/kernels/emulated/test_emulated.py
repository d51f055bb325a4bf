"""The memory-bound kernels' source, run on the CPU, against the reference: no GPU needed.

The same comparisons run on a GPU in the tests of each operator; these find wrong indices, masks and
exchanges where there is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from fp8moe import testing
from fp8moe.kernels import cast, cast_permute, dispatch, gather, permute, reference, routing
from fp8moe.kernels.fp8tensor import ceil_div

from .conftest import plant

Start = Callable[..., torch.Tensor]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    different = testing.bits(actual) != testing.bits(expected)
    assert not different.any(), f"{int(different.sum())} differ, first {different.nonzero()[0]}"


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Gaussian, rows up to 2**10 apart, with zeros and a few NaN and Inf."""
    x = torch.randn(shape) * torch.randint(-5, 6, (*shape[:-1], 1)).exp2()
    chance = torch.rand(shape)
    x.masked_fill_(chance < 0.05, 0.0)
    x.masked_fill_(chance > 0.9998, math.nan)
    x.masked_fill_((chance > 0.9996) & (chance <= 0.9998), -math.inf)
    return x.to(dtype)


# -------------------------------------------------------------------------------------------- casts

CASTS = [
    (torch.bfloat16, True, [(1, 16), (70, 264), (129, 400)]),
    (torch.bfloat16, False, [(5, 7), (130, 257)]),
    (torch.float32, False, [(65, 384)]),
    (torch.float16, True, [(33, 272)]),
]


@pytest.mark.parametrize(("dtype", "pow2", "shapes"), CASTS)
def test_rows_and_blocks(
    emulated: Start, dtype: torch.dtype, pow2: bool, shapes: list[tuple[int, int]]
) -> None:
    emulated(cast)
    for m, k in shapes:
        x = values(m, k, dtype=dtype)
        for actual, expected in zip(
            cast._cast_per_token_cuda(x, pow2), reference.cast_per_token(x, pow2), strict=True
        ):
            assert_same(actual, expected)
        w = values(2, m, k, dtype=dtype)
        wanted = reference.cast_per_block_both(w, pow2)
        both = cast._cast_per_block_both_cuda(w, pow2)
        one = cast._cast_per_block_cuda(w, pow2)
        moved = cast._transpose_per_block_cuda(wanted[0], wanted[1])
        for actual, expected in zip((*both, *one, *moved), (*wanted, *wanted), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("sizes", [[1], [0, 130, 0, 0, 128, 5, 0], [0] * 40 + [3] + [1] * 33])
@pytest.mark.parametrize("block", [False, True], ids=["channels", "blocks"])
@pytest.mark.parametrize(
    ("dtype", "pow2", "columns"),
    [(torch.bfloat16, True, 136), (torch.float16, False, 7), (torch.float32, True, 16)],
)
def test_channels(
    emulated: Start,
    dtype: torch.dtype,
    pow2: bool,
    columns: int,
    block: bool,
    sizes: list[int],
) -> None:
    status = emulated(cast)
    x = values(sum(sizes) + 3, columns, dtype=dtype)
    ends = torch.tensor(sizes).cumsum(0).int()
    data, scale = cast._cast_per_channel_cuda(x, ends, pow2, block)
    expected = reference.cast_per_channel(x, ends, pow2, block)
    used = sum(ceil_div(s, 128) * 128 for s in sizes)
    assert_same(data[:, :used], expected[0][:, :used])
    assert_same(scale[:, : used // 128], expected[1][:, : used // 128])
    assert (data.view(torch.uint8)[:, used:] == 0xA5).all(), "wrote past the last group"
    past = scale[:, used // 128 :].flatten().view(torch.uint8)
    assert (past == 0xA5).all(), "wrote past the last group"
    assert not status.any()


@pytest.mark.parametrize(
    ("ends", "record"),
    [
        ([5, 3, 200], [1, 1, 3, 5]),
        ([-1, 3, 200], [1, 0, -1, 0]),
        ([5, 201, 200], [2, 1, 201, 200]),
        ([0, 200] * 33, [1, 2, 0, 200]),
        ([2**31 - 1, -(2**31)] * 33, [2, 0, 2**31 - 1, 200]),
    ],
)
def test_bad_group_ends_are_reported_and_followed_safely(
    emulated: Start, ends: list[int], record: list[int]
) -> None:
    status = emulated(cast)
    cast._cast_per_channel_cuda(values(200, 24), torch.tensor(ends, dtype=torch.int32), True, False)
    assert status[:4].tolist() == record


# ---------------------------------------------------------------------------- routing, permutation


def routed(tokens: int, topk: int, experts: int, dropped: float = 0.0) -> tuple[torch.Tensor, ...]:
    ids, weights = testing.random_topk(tokens, topk, experts, seed=1, dropped=dropped)
    return ids, weights, *reference.route(ids, experts)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "dropped"),
    [(1, 1, 1, 0.0), (300, 3, 5, 0.2), (1100, 2, 300, 0.0)],
)
def test_route(
    emulated: Start,
    ids_dtype: torch.dtype,
    tokens: int,
    topk: int,
    experts: int,
    dropped: float,
) -> None:
    ids, _, *expected = routed(tokens, topk, experts, dropped)
    status = emulated(routing)
    for actual, wanted in zip(
        routing._route_cuda(ids.to(ids_dtype), experts), expected, strict=True
    ):
        assert_same(actual, wanted)
    kept_row = expected[0][expected[0] >= 0]
    *maps, rows = routing._route_kept_cuda(ids.to(ids_dtype), experts, len(kept_row))
    assert_same(rows, kept_row)
    expected[1] = expected[1][: len(maps[1])]
    for actual, wanted in zip(maps, expected, strict=True):
        assert_same(actual, wanted)
    assert not status.any()
    ids[0, 0] = experts + 1
    routing._route_cuda(ids.to(ids_dtype), experts)
    assert status[:4].tolist() == [3, 0, experts + 1, experts]


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "ranks"),
    [(0, 2, 4, 2), (1, 1, 1, 1), (41, 3, 6, 3), (1100, 2, 300, 150), (900, 7, 8, 2)],
)
def test_dispatch(
    emulated: Start, ids_dtype: torch.dtype, tokens: int, topk: int, experts: int, ranks: int
) -> None:
    ids = torch.randint(0, experts + 1, (tokens, topk), dtype=ids_dtype)
    ids[3:4] = torch.tensor([-1, experts + 1] * 4, dtype=ids_dtype)[:topk]
    emulated(dispatch)
    expected = reference.dispatch_maps(ids, experts, ranks, [4, 5])
    *maps, sizes = dispatch._maps_cuda(ids, experts, ranks, [4, 5])
    assert_same(sizes[0], expected[4][0])
    for actual, wanted in zip(maps, expected, strict=False):
        assert_same(actual, wanted)
    if tokens:
        weights = torch.rand(tokens, topk)
        got, wanted = torch.full((2, len(maps[3]), 2 * topk + 3), 9, dtype=torch.int32)
        args = ids, weights, maps[1], experts // ranks
        dispatch._routing_cuda(*args, got[:, 2:-1])
        reference.dispatch_routing(*args, wanted[:, 2:-1])
        assert_same(got, wanted)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(first ? 0 : 1)", "0"),
        ("if (other >= begin && other < end) first = false", "(void)other"),
        ("place += earlier[i]", "place += 0"),
        ("peers & firsts & lanes_before()", "peers & lanes_before()"),
    ],
    ids=["shared row", "first", "earlier", "rows"],
)
def test_a_planted_error_in_the_dispatch_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    plant(monkeypatch, right, wrong)
    emulated(dispatch)
    ids = torch.randint(0, 17, (900, 7))
    expected = reference.dispatch_maps(ids, 16, 8, [])
    with pytest.raises((AssertionError, RuntimeError)):
        for actual, wanted in zip(
            dispatch._maps_cuda(ids, 16, 8, [])[:4], expected[:4], strict=True
        ):
            assert_same(actual, wanted)


def used_rows(slot_of_row: torch.Tensor) -> int:
    return int((slot_of_row != -2).sum())


@pytest.mark.parametrize(("topk", "hidden"), [(1, 128), (3, 640)])
def test_permute_rows_and_gather_sum(emulated: Start, topk: int, hidden: int) -> None:
    _, _, row_of_slot, slot_of_row, _, _ = routed(90, topk, 4, 0.1)
    emulated(permute, gather)
    x = values(90, hidden)
    used = used_rows(slot_of_row)
    apart = torch.full((90, hidden + 24), 9, dtype=x.dtype)[:, 8:-16].copy_(x)
    for source in (x, apart):
        rows = permute._permute_rows_cuda(source, row_of_slot, slot_of_row)
        assert_same(rows[:used], reference.permute_rows(x, row_of_slot, slot_of_row)[:used])
    finite = torch.randn(len(slot_of_row), hidden).bfloat16()
    total = gather._gather_sum_cuda(finite, row_of_slot)
    assert_same(total, reference.gather_sum(finite, row_of_slot))
    partials = torch.randn(3, len(slot_of_row))
    sums = gather._gather_slots_cuda(partials, row_of_slot)
    assert_same(sums, reference.gather_slots(partials, row_of_slot))


def in_packets(data: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies as parts of the rows of a message, with other things around them."""
    rows, columns = data.shape
    packet = torch.full((rows, ceil_div(columns + 4 * scale.shape[1] + 8, 16) * 16), 0x55).byte()
    parts = (
        packet.view(data.dtype)[:, :columns],
        packet.view(torch.float32)[:, columns // 4 : columns // 4 + scale.shape[1]],
    )
    return parts[0].copy_(data), parts[1].copy_(scale)


@pytest.mark.parametrize(
    ("pow2_in", "pow2", "spread"), [(True, True, 5), (True, True, 40), (False, False, 5)]
)
def test_permute_fp8(emulated: Start, pow2_in: bool, pow2: bool, spread: int) -> None:
    _, _, row_of_slot, slot_of_row, _, _ = routed(90, 2, 4, 0.1)
    x = torch.randn(90, 384) * torch.randint(-spread, spread + 1, (90, 1)).exp2()
    x[3] = 0
    x[5, 7] = math.nan
    emulated(permute)
    data, scale = reference.cast_per_token(x.bfloat16(), pow2_in)
    used = used_rows(slot_of_row)
    expected = reference.permute_fp8_both(data, scale, slot_of_row, 2, pow2)
    for x8 in ((data, scale), in_packets(data, scale)):
        assert_same(x8[0], data)
        assert_same(x8[1], scale)
        rows = permute._permute_fp8_cuda(*x8, row_of_slot, slot_of_row)
        channels = permute._permute_fp8_to_channel_cuda(*x8, slot_of_row, 2, pow2, False)
        both = permute._permute_fp8_both_cuda(*x8, slot_of_row, 2, pow2)
        for actual in ((*rows, *channels), both):
            for got, wanted, at in zip(
                actual,
                expected,
                [(slice(used),), (slice(used),)]
                + [(slice(None), slice(n)) for n in (used, used // 128)],
                strict=True,
            ):
                assert_same(got[at], wanted[at])


@pytest.mark.parametrize(("topk", "hidden"), [(1, 128), (3, 1408), (35, 128)])
@pytest.mark.parametrize(("pow2", "spread"), [(True, 5), (True, 40), (False, 5)])
def test_cast_permute(emulated: Start, pow2: bool, spread: int, topk: int, hidden: int) -> None:
    _, _, row_of_slot, slot_of_row, _, _ = routed(50, topk, max(4, topk), 0.1)
    x = torch.randn(50, hidden) * torch.randint(-spread, spread + 1, (50, 1)).exp2()
    x[3] = 0
    x[:, 17] = 0
    x[5, 7] = math.nan
    x = x.bfloat16()
    emulated(cast, cast_permute, permute)
    used = used_rows(slot_of_row)
    real = slot_of_row[:used] >= 0
    expected = reference.cast_permute_both(x, slot_of_row, topk, pow2)
    rows = permute.rows_like(x, slot_of_row)
    rows[0].view(torch.uint8).fill_(0x55)
    rows[1].fill_(7.0)
    cast_permute.launch_rows(x, row_of_slot, slot_of_row, pow2, *rows)
    assert (rows[1][slot_of_row == -1] == 2.0**-56).all()
    assert (rows[1][slot_of_row == -2] == 7.0).all()
    assert (rows[0].view(torch.uint8)[slot_of_row < 0] == 0x55).all()
    sent = in_packets(*map(torch.zeros_like, rows))
    cast_permute.launch_rows(x, row_of_slot, slot_of_row, pow2, *sent)
    wide = in_packets(*map(torch.zeros_like, rows))
    cast_permute.launch_rows(x.float(), row_of_slot, slot_of_row, pow2, *wide)
    for actual in (rows, sent, wide):
        for got, wanted in zip(actual, expected[:2], strict=True):
            assert_same(got[:used][real], wanted[:used][real])
    channels = cast_permute._channel_cuda(x, slot_of_row, topk, pow2, False)
    both = cast_permute._both_cuda(x, slot_of_row, topk, pow2)
    for got, wanted in zip(both[:2], expected[:2], strict=True):
        assert_same(got[:used], wanted[:used])
    for data_t, scale_t in (channels, both[2:]):
        assert_same(data_t[:, :used], expected[2][:, :used])
        assert_same(scale_t[:, : used // 128], expected[3][:, : used // 128])


# -------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("8 * (g ^ c)", "8 * g"),
        ("(lane & 16) | (2 * i)", "(lane & 16) | i"),
        ("kAligned && rows_left >= 8", "kAligned"),
        ("(amax_bits + 0x1FFFFFu)", "(amax_bits + 0x200000u)"),
    ],
    ids=["staging", "shuffle", "mask", "rounding"],
)
def test_a_planted_error_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    plant(monkeypatch, right, wrong)
    emulated(cast)
    w = torch.randn(1, 136, 272).bfloat16()
    w[0, 0, 0] = 448.0 * 2**5
    with pytest.raises((AssertionError, RuntimeError)):
        for actual, expected in itertools.chain(
            zip(
                cast._cast_per_block_both_cuda(w, True),
                reference.cast_per_block_both(w, True),
                strict=True,
            ),
            zip(
                cast._cast_per_token_cuda(w[0], True),
                reference.cast_per_token(w[0], True),
                strict=True,
            ),
        ):
            assert_same(actual, expected)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("struct alignas(16) Scales", "struct Scales"),
        ("0x98009800u", "0x94009400u"),
        ("((exponent - 23) << 23)", "((exponent - 22) << 23)"),
        ("amax[j] + 0x00FF00FFu", "amax[j] + 0x007F007Fu"),
        ("slot < 0 || !inside", "!inside"),
    ],
    ids=["alignment", "factor", "scale", "rounding", "padding"],
)
def test_a_planted_error_in_the_transposition_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    plant(monkeypatch, right, wrong)
    _, _, _, slot_of_row, _, _ = routed(90, 2, 4, 0.1)
    x = torch.randn(90, 256).bfloat16()
    emulated(permute)
    x8 = reference.cast_per_token(x, True)
    used = used_rows(slot_of_row)
    with pytest.raises((AssertionError, RuntimeError)):
        data_t, scale_t = permute._permute_fp8_to_channel_cuda(*x8, slot_of_row, 2, True, False)
        expected = reference.permute_fp8_to_channel(*x8, slot_of_row, 2, True, False)
        assert_same(data_t[:, :used], expected[0][:, :used])
        assert_same(scale_t[:, : used // 128], expected[1][:, : used // 128])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("| lane_of_row(i)", "| i"),
        ("((lane >> 1) & 1)", "(lane & 1)"),
        ("8 * (chunk & 1)", "0 * (chunk & 1)"),
    ],
    ids=["shuffle", "row", "half"],
)
def test_a_planted_error_in_the_cast_permutation_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    plant(monkeypatch, right, wrong)
    _, _, _, slot_of_row, _, _ = routed(90, 2, 4, 0.1)
    x = (torch.randn(90, 128) * torch.randint(-5, 6, (90, 1)).exp2()).bfloat16()
    emulated(cast_permute, permute)
    used = used_rows(slot_of_row)
    with pytest.raises((AssertionError, RuntimeError)):
        got = cast_permute._both_cuda(x, slot_of_row, 2, True)
        expected = reference.cast_permute_both(x, slot_of_row, 2, True)
        assert_same(got[0][:used], expected[0][:used])
        assert_same(got[1][:used], expected[1][:used])
        assert_same(got[2][:, :used], expected[2][:, :used])
