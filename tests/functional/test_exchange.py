"""Where slots are in the messages of an exchange, against plain loops."""

from __future__ import annotations

import pytest
import torch

from fp8moe.functional.exchange import _SLOTS, _Counts, _Maps


def expected(rank: list[list[int]], ranks: int) -> tuple[list[list[int]], ...]:
    """Rows, first rows, positions of all slots; (rows, slots) of each rank; slots of the rows."""
    row, first, position = ([[-1] * len(choices) for choices in rank] for _ in range(3))
    counts, slot_of_row, slots = [], [], 0
    for r in range(ranks):
        before = len(slot_of_row), slots
        for t, choices in enumerate(rank):
            mine = [k for k, choice in enumerate(choices) if choice == r]
            if mine:
                first[t][mine[0]] = len(slot_of_row)
                slot_of_row.append(t * len(choices) + mine[0])
            for k in mine:
                row[t][k], position[t][k] = len(slot_of_row) - 1, slots
                slots += 1
        counts.append([len(slot_of_row) - before[0], slots - before[1]])
    return row, first, position, counts, [slot_of_row]


@pytest.mark.parametrize(
    ("tokens", "topk", "ranks"), [(50, 3, 4), (200, 8, 2), (7, 1, 3), (0, 2, 4)]
)
@pytest.mark.parametrize("wants_position", [True, False])
def test_maps(device, tokens, topk, ranks, wants_position):
    generator = torch.Generator().manual_seed(tokens)
    rank = torch.randint(0, ranks + 1, (tokens, topk), generator=generator)  # ranks: dropped
    rank[: tokens // 4] = rank[: tokens // 4, :1]  # all of a token's experts on one rank
    counts = _Counts.of(rank.to(device), ranks)
    maps = _Maps.of(counts, wants_position)
    row, first, position, numbers, (slot_of_row,) = expected(rank.tolist(), ranks)
    assert maps.row.tolist() == row and maps.first_row.tolist() == first
    assert [[n >> 32, n & _SLOTS] for n in counts.of_rank.tolist()] == numbers
    assert (maps.position is not None) == wants_position
    if maps.position is not None:
        assert maps.position.tolist() == position
    assert len(maps.slot) % 128 == 0 and len(maps.slot) >= max(128, len(slot_of_row))
    assert maps.slot.tolist() == slot_of_row + [-2] * (len(maps.slot) - len(slot_of_row))
    for t in (maps.row, maps.first_row, maps.slot):
        assert t.dtype == torch.int32 and t.is_contiguous()
