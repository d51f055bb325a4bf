"""Sums over a token's rows, and values of its slots: bit-equal to the reference on both devices."""

from __future__ import annotations

import pytest
import torch

from fp8moe.kernels import gather, reference


def random_ids(tokens: int, topk: int, experts: int) -> torch.Tensor:
    """Some of them drop their slot."""
    return torch.randint(0, experts + 1, (tokens, topk))


@pytest.mark.parametrize("topk", [1, 2, 3, 4, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("hidden", [8, 264, 1096])
def test_gather_sum(device: torch.device, topk: int, hidden: int) -> None:
    ids = random_ids(37, topk, 5)
    ids[3] = 5  # a token without experts
    row_of_slot, slot_of_row, _, _ = reference.route(ids, 5)
    rows = torch.randn(len(slot_of_row), hidden).bfloat16()
    rows[slot_of_row < 0] = float("nan")
    got = gather.gather_sum(rows.to(device), row_of_slot.to(device))
    assert torch.equal(got.cpu(), reference.gather_sum(rows, row_of_slot))
    assert not got[3].any()


@pytest.mark.parametrize("planted", ["order", "dropped row"])
def test_a_planted_error_is_noticed(planted: str) -> None:
    """Equality tells one order of summation from another, and a single dropped row."""
    ids = torch.randint(0, 4, (40, 8))
    row_of_slot, slot_of_row, _, _ = reference.route(ids, 4)
    rows = torch.randn(len(slot_of_row), 64).bfloat16()
    large, cancels = row_of_slot[:, 1].long(), row_of_slot[:, 5].long()
    rows[large] *= 2.0**24  # takes bits from what is added before slot 5, not from what follows
    rows[cancels] = -rows[large]
    expected = reference.gather_sum(rows, row_of_slot)
    if planted == "order":
        row_of_slot = row_of_slot.flip(1)
    else:
        row_of_slot[17, 7] = -1
    assert not torch.equal(reference.gather_sum(rows, row_of_slot), expected)


@pytest.mark.parametrize("count", [0, 1, 6, 17])
def test_gather_slots(device: torch.device, count: int) -> None:
    row_of_slot, slot_of_row, _, _ = reference.route(random_ids(301, 3, 4), 4)
    partials = torch.randn(count, len(slot_of_row))
    partials[:, slot_of_row < 0] = float("nan")
    got = gather.gather_slots(partials.to(device), row_of_slot.to(device))
    assert torch.equal(got.cpu(), reference.gather_slots(partials, row_of_slot))


@pytest.mark.gpu
def test_a_misaligned_pointer_is_named() -> None:
    rows = torch.zeros(128 * 16 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(128, 16)
    with pytest.raises(ValueError, match="rows: expected a 16-byte aligned address"):
        gather.gather_sum(rows, IDS.int().cuda())


IDS = torch.zeros((4, 2), dtype=torch.int64)
ROWS = torch.zeros((128, 16), dtype=torch.bfloat16)

BAD_CALLS = {
    "rows width": (gather.gather_sum, (ROWS[:, :4].contiguous(), IDS.int()), "multiple of 8"),
    "rows map": (gather.gather_sum, (ROWS, IDS), "row_of_slot: expected torch.int32"),
    "partials": (gather.gather_slots, (ROWS, IDS.int()), "partials: expected torch.float32"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case: str) -> None:
    call, args, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(*args)
