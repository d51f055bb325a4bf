"""The routing map on both devices: a stable sort by expert, padded, whatever the ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe.kernels import reference, routing, status
from fp8moe.kernels.fp8tensor import padded_capacity

Tensors = tuple[torch.Tensor, ...]


def random_ids(tokens: int, topk: int, experts: int) -> torch.Tensor:
    """Some of them drop their slot."""
    return torch.randint(0, experts + 1, (tokens, topk))


def assert_same(got: Tensors, expected: Tensors) -> None:
    for name, a, b in zip(("rows", "slots", "ends", "counts"), got, expected, strict=True):
        assert torch.equal(a.cpu(), b), f"{name} differ"


def stable_route(ids: list[int], experts: int) -> list[int]:
    """slot_of_row by a stable sort, padding included."""
    rows: list[int] = []
    for expert in range(experts):
        mine = [slot for slot, e in enumerate(ids) if e == expert]
        rows += mine + [-1] * (-len(mine) % 128)
    return rows + [-2] * (padded_capacity(len(ids), experts) - len(rows))


@given(data=st.data())
def test_route_is_a_stable_argsort(device: torch.device, data: Any) -> None:
    experts = data.draw(st.integers(1, 70))
    tokens, topk = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 9))
    low = data.draw(st.integers(0, experts))
    dtype = data.draw(st.sampled_from(routing.ID_DTYPES))
    ids = torch.randint(low, experts + 1, (tokens, topk)).to(dtype)
    row_of_slot, slot_of_row, group_ends, counts = routing.route(ids.to(device), experts)
    expected = stable_route(ids.flatten().tolist(), experts)
    assert slot_of_row.tolist() == expected
    inverse = {slot: row for row, slot in enumerate(expected) if slot >= 0}
    flat = row_of_slot.flatten().tolist()
    assert flat == [inverse.get(slot, -1) for slot in range(ids.numel())]
    assert counts.tolist() == torch.bincount(ids.flatten(), minlength=experts)[:experts].tolist()
    assert group_ends.tolist() == ((counts.cpu() + 127) // 128 * 128).cumsum(0).tolist()


@pytest.mark.parametrize(
    ("tokens", "topk", "experts"),
    [(0, 2, 4), (1, 1, 1), (700, 4, 100), (3000, 8, 1024), (5000, 2, 8), (40000, 8, 128)],
)
@pytest.mark.parametrize("dtype", routing.ID_DTYPES, ids=str)
def test_route_equals_the_reference(
    device: torch.device, tokens: int, topk: int, experts: int, dtype: torch.dtype
) -> None:
    ids = random_ids(tokens, topk, experts).to(dtype)
    assert_same(routing.route(ids.to(device), experts), reference.route(ids, experts))


@pytest.mark.parametrize(
    ("tokens", "topk", "experts"), [(0, 2, 4), (700, 4, 100), (40000, 8, 1024)]
)
def test_rows_of_kept_slots(device: torch.device, tokens: int, topk: int, experts: int) -> None:
    ids = torch.where(torch.rand(tokens, topk) < 0.5, experts, random_ids(tokens, topk, experts))
    *maps, kept_row = routing.route_kept(ids.to(device), experts, int((ids < experts).sum()))
    expected = list(reference.route(ids, experts))
    assert kept_row.tolist() == expected[0][expected[0] >= 0].tolist()
    expected[1] = expected[1][: len(maps[1])]
    assert len(maps[1]) == padded_capacity(len(kept_row), experts)
    assert_same(tuple(maps), tuple(expected))


def test_a_wrong_number_of_kept_slots_is_named() -> None:
    with pytest.raises(ValueError, match="topk_ids: expected 7 slots that are kept, got 8"):
        routing.route_kept(torch.zeros((4, 2), dtype=torch.int64), 4, 7)


@pytest.mark.parametrize("fill", [0, 5, 8], ids=["first", "inner", "dropped"])
def test_all_slots_to_one_expert(device: torch.device, fill: int) -> None:
    ids = torch.full((5000, 2), fill)
    assert_same(routing.route(ids.to(device), 8), reference.route(ids, 8))


def test_two_runs_are_equal(device: torch.device) -> None:
    ids = random_ids(4000, 8, 60).to(device)
    first, second = routing.route(ids, 60), routing.route(ids, 60)
    assert_same(first, tuple(t.cpu() for t in second))


def test_a_planted_error_is_noticed() -> None:
    expected = reference.route(random_ids(60, 2, 4), 4)
    for i, tensor in enumerate(expected):
        planted = list(expected)
        planted[i] = tensor.clone()
        planted[i].view(-1)[1] += 1
        with pytest.raises(AssertionError, match="differ"):
            assert_same(tuple(planted), expected)


@pytest.mark.parametrize("bad", [-1, 9, 1 << 40])
def test_bad_ids_are_named(device: torch.device, bad: int) -> None:
    ids = random_ids(3000, 2, 8)
    ids[1500, 1] = ids[2000, 0] = bad
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"topk_ids.*got {bad} at flat index 3001"):
            routing.route(ids, 8)
        return
    got = routing.route(ids.to(device), 8)
    limit = min(bad, (1 << 31) - 1)
    with pytest.raises(ValueError, match=f"0 <= id <= 8 .*got {limit} at flat index 3001"):
        status.check_errors()
    ids[1500, 1] = ids[2000, 0] = 8  # dropped, and nothing else happens
    assert_same(got, reference.route(ids, 8))
    status.check_errors()


IDS = torch.zeros((4, 2), dtype=torch.int64)

BAD_CALLS = {
    "ids dtype": ((IDS.float(), 4), "topk_ids: expected torch.int32 or torch.int64"),
    "ids dim": ((IDS[0], 4), r"topk_ids: expected shape \(T, K\), got \(2,\)"),
    "ids stride": ((IDS.t(), 4), "topk_ids: expected a contiguous"),
    "no experts": ((IDS, 0), "num_experts: expected 1 to 1024, got 0"),
    "experts": ((IDS, 1025), "num_experts: expected 1 to 1024, got 1025"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case: str) -> None:
    args, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        routing.route(*args)
