"""The order of an exchange, against loops; everything else needs a group (tests/modules)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe.functional.exchange import _SLOTS, Exchange, _Counts, _Maps


def by_loops(
    rank: list[list[int]], ranks: int
) -> tuple[list[list[list[int]]], list[list[int]], list[int]]:
    """row, first_row and position of every slot; rows and slots of every rank; the first slot of
    every row."""
    shape = [[-1] * len(token) for token in rank]
    row, first_row, position = ([list(token) for token in shape] for _ in range(3))
    rows, slots, slot_of_row = [0] * ranks, [0] * ranks, []
    for r in range(ranks):
        for t, token in enumerate(rank):
            here = [k for k, to in enumerate(token) if to == r]
            for k in here:
                row[t][k] = sum(rows)
                position[t][k] = sum(slots)
                slots[r] += 1
            if here:
                first_row[t][here[0]] = row[t][here[0]]
                slot_of_row.append(t * len(token) + here[0])
                rows[r] += 1
    return [row, first_row, position], [rows, slots], slot_of_row


@given(
    st.integers(1, 5).flatmap(
        lambda ranks: st.tuples(
            st.just(ranks),
            st.integers(1, 4).flatmap(
                lambda k: st.lists(st.lists(st.integers(0, ranks), min_size=k, max_size=k))
            ),
        )
    )
)
def test_order(case: tuple[int, list[list[int]]]) -> None:
    ranks, rank = case
    topk = len(rank[0]) if rank else 2
    counts = _Counts.of(torch.tensor(rank, dtype=torch.int64).view(-1, topk), ranks)
    maps = _Maps.of(counts, wants_position=True)
    expected, numbers, slot_of_row = by_loops(rank, ranks)
    found = [maps.row, maps.first_row, maps.position]
    assert [t.tolist() for t in found] == expected
    of_rank = counts.of_rank.tolist()
    assert [[n >> 32 for n in of_rank], [n & _SLOTS for n in of_rank]] == numbers
    assert maps.slot.tolist() == slot_of_row + [-2] * (len(maps.slot) - len(slot_of_row))
    assert len(maps.slot) >= 128 and len(maps.slot) % 128 == 0
    assert all(t.is_contiguous() and t.dtype == torch.int32 for t in (*found, maps.slot))
    assert _Maps.of(counts, wants_position=False).position is None


def test_what_differs_between_ranks_is_named() -> None:
    of = [[5, 0, 2, 8, 0], [7, 0, 2, 8, 1]]
    Exchange._check([of[0], of[0]], 8, ["K", "E", "combine"])
    with pytest.raises(ValueError, match=r"combine: expected the same .* got \[0, 1\]"):
        Exchange._check(of, 8, ["K", "E", "combine"])
    of[1][1:] = [3, 2, 8, 0]
    with pytest.raises(ValueError, match=r"topk_ids: expected ids 0 to 8.* on ranks \[1\]"):
        Exchange._check(of, 8, ["K", "E", "combine"])
