"""What of an exchange needs no group; everything else is in tests/modules."""

from __future__ import annotations

import pytest
import torch

from fp8moe.functional.exchange import Exchange, Layout


@pytest.mark.parametrize(
    ("layout", "row_bytes"),
    [
        (Layout(7168, True, 2), 7168 + 224 + 16),
        (Layout(256, True, 3), 288),
        (Layout(256, True, 0), 272),
        (Layout(144, False, 1), 304),
        (Layout(48, False, 0), 96),
    ],
)
def test_parts_of_a_message(layout: Layout, row_bytes: int) -> None:
    assert layout.row_bytes == row_bytes
    rows = torch.arange(3 * row_bytes).to(torch.uint8).view(3, row_bytes)
    data, scale, routing = layout.parts(rows)
    found = [data, *(part for part in (scale, routing) if part is not None)]
    joined = torch.cat([part.contiguous().view(torch.uint8) for part in found], dim=1)
    assert torch.equal(joined, rows[:, : joined.shape[1]])
    assert row_bytes - joined.shape[1] < 16
    assert data.shape == (3, layout.hidden) and data.element_size() == (1 if layout.fp8 else 2)
    assert scale is None if not layout.fp8 else scale.shape == (3, layout.hidden // 128)
    assert routing is None if not layout.topk else routing.shape == (3, 2 * layout.topk)


def test_what_differs_between_ranks_is_named() -> None:
    of = [[5, 9, 0, 2, 8, 0], [7, 9, 0, 2, 8, 1]]
    Exchange._check([of[0], of[0]], 8, ["K", "E", "combine"])
    with pytest.raises(ValueError, match=r"combine: expected the same .* got \[0, 1\]"):
        Exchange._check(of, 8, ["K", "E", "combine"])
    of[1][2:] = [3, 2, 8, 0]
    with pytest.raises(ValueError, match=r"topk_ids: expected ids 0 to 8.* on ranks \[1\]"):
        Exchange._check(of, 8, ["K", "E", "combine"])
