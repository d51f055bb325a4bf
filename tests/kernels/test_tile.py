"""The index maps of csrc/tile.cuh, enumerated: what no test of values shows."""

from __future__ import annotations

import pytest
import torch


def tile_offset(row: int, chunk: int) -> int:
    """As in tile.cuh: the byte offset of 16-byte chunk `chunk` of row `row`."""
    return row * 256 + ((chunk ^ (row >> 2 & 7)) << 4)


def test_the_tile_has_no_bank_conflicts() -> None:
    """Eight neighbouring lanes move 128 bytes at once, which must lie in 32 different banks."""
    assert len({tile_offset(r, c) for r in range(128) for c in range(16)}) == 128 * 16
    along_rows = [[(2 * w + lane // 16, lane % 16) for lane in range(32)] for w in range(64)]
    along_columns = [
        [(4 * lane + i, chunk) for lane in range(32)] for i in range(4) for chunk in range(16)
    ]
    for warp in along_rows + along_columns:
        for at in range(0, 32, 8):
            banks = {tile_offset(r, c) // 16 % 8 for r, c in warp[at : at + 8]}
            assert len(banks) == 8
    straight = {(4 * lane * 256 + 16) // 16 % 8 for lane in range(8)}
    assert len(straight) == 1  # without the xor all eight lanes would meet in the same banks


@pytest.mark.parametrize("count", [4, 8, 16])
def test_recursive_halving_leaves_each_column_to_its_lanes(count: int) -> None:
    """reduce_columns, on lists: lane L ends with the maximum of column L * count // 32."""
    values = torch.randint(0, 1000, (32, count)).tolist()
    lanes = [list(v) for v in values]
    shuffles = 0
    step = 16
    while step:
        left = max(1, len(lanes[0]) // 2)
        halve = len(lanes[0]) > 1
        given, kept = [], []
        for lane, v in enumerate(lanes):
            upper = halve and lane & step
            given.append((v[:left] if upper else v[left:]) if halve else v)
            kept.append((v[left:] if upper else v[:left]) if halve else v)
        lanes = [
            [max(a, b) for a, b in zip(kept[lane], given[lane ^ step], strict=True)]
            for lane in range(32)
        ]
        shuffles += left
        step //= 2
    for lane in range(32):
        column = lane * count // 32
        assert lanes[lane] == [max(v[column] for v in values)]
    assert shuffles == count - 1 + 5 - count.bit_length() + 1
