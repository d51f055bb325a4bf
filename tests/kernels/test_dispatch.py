"""The maps of a dispatch on both devices, against loops, and what travels beside a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe.kernels import dispatch, reference

Lists = list[list[int]]
NAMES = ("row", "first_row", "position", "slot_of_row", "sizes")


def by_loops(ids: Lists, experts: int, ranks: int) -> tuple[list[Lists], list[int], Lists]:
    """(row, first_row and position of every slot), the first slot of every row, sizes."""
    local = experts // ranks
    row, first_row, position = ([[-1] * len(token) for token in ids] for _ in range(3))
    slot_of_row: list[int] = []
    sizes, slots = [], 0
    wrong = sum(not 0 <= e <= experts for token in ids for e in token)
    for r in range(ranks):
        rows_before, slots_before = len(slot_of_row), slots
        for t, token in enumerate(ids):
            here = [k for k, e in enumerate(token) if r * local <= e < (r + 1) * local]
            for k in here:
                row[t][k] = len(slot_of_row)
                position[t][k] = slots
                slots += 1
            if here:
                first_row[t][here[0]] = len(slot_of_row)
                slot_of_row.append(t * len(token) + here[0])
        sizes.append([len(slot_of_row) - rows_before, slots - slots_before, wrong])
    return [row, first_row, position], slot_of_row, sizes


@given(data=st.data())
def test_order(device: torch.device, data: st.DataObject) -> None:
    ranks, local, topk = (data.draw(st.integers(1, 4)) for _ in range(3))
    experts = ranks * local
    token = st.lists(st.integers(-1, experts + 1), min_size=topk, max_size=topk)
    ids = data.draw(st.lists(token, max_size=60))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    given_ids = torch.tensor(ids, dtype=dtype).view(-1, topk).to(device)
    *maps, slot_of_row, sizes = dispatch.dispatch_maps(given_ids, experts, ranks, [7, 5])
    expected, slots, numbers = by_loops(ids, experts, ranks)
    assert [t.tolist() for t in maps] == expected
    assert slot_of_row.tolist() == slots + [-2] * (len(slot_of_row) - len(slots))
    assert len(slot_of_row) % 128 == 0
    assert sizes.shape[0] == 2 and sizes[0].tolist() == [[*line, 7, 5] for line in numbers]
    assert all(t.is_contiguous() and t.dtype == torch.int32 for t in (*maps, slot_of_row, sizes))


def random_ids(tokens: int, topk: int, experts: int) -> torch.Tensor:
    return torch.randint(0, experts + 1, (tokens, topk))


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        if name == "sizes":
            a, b = a[0], b[0]
        assert torch.equal(a.cpu(), b), f"{name} differ"


@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "ranks"),
    [(0, 2, 4, 2), (1, 1, 1, 1), (700, 3, 96, 8), (3000, 8, 512, 256), (40000, 8, 128, 2)],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_maps_equal_the_reference(
    device: torch.device, tokens: int, topk: int, experts: int, ranks: int, dtype: torch.dtype
) -> None:
    ids = random_ids(tokens, topk, experts).to(dtype)
    args = (experts, ranks, [1, 2, 3])
    assert_same(dispatch.dispatch_maps(ids.to(device), *args), reference.dispatch_maps(ids, *args))


def test_a_planted_error_is_noticed() -> None:
    expected = reference.dispatch_maps(random_ids(60, 2, 4), 4, 2, [1])
    for i, tensor in enumerate(expected):
        planted = list(expected)
        planted[i] = tensor.clone()
        planted[i].view(-1)[1] += 1
        with pytest.raises(AssertionError, match="differ"):
            assert_same(tuple(planted), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_routing_travels_with_its_row(device: torch.device, dtype: torch.dtype) -> None:
    tokens, topk, experts, ranks = 300, 3, 8, 4
    ids = random_ids(tokens, topk, experts)
    weights = torch.rand(tokens, topk)
    _, first_row, _, slot_of_row, _ = reference.dispatch_maps(ids, experts, ranks, [])
    packet = torch.full((len(slot_of_row), 2 * topk + 5), 99, dtype=torch.int32, device=device)
    out = packet[:, 4 : 4 + 2 * topk]
    args = ids.to(dtype), weights, first_row
    dispatch.dispatch_routing(*(t.to(device) for t in args), experts // ranks, out)
    for row, slot in enumerate(slot_of_row.tolist()):
        if slot < 0:
            assert (packet[row] == 99).all()
            continue
        t, k = divmod(slot, topk)
        rank = int(ids[t, k]) // 2
        assert out[row, :topk].view(torch.float32).tolist() == weights[t].tolist()
        local = [e - 2 * rank if e // 2 == rank else 2 for e in ids[t].tolist()]
        assert out[row, topk:].tolist() == local
    assert (packet[:, :4] == 99).all() and (packet[:, -1] == 99).all()


IDS = torch.zeros((4, 2), dtype=torch.int64)

BAD_MAPS = {
    "ids dtype": ((IDS.float(), 4, 2, []), "topk_ids: expected torch.int32 or torch.int64"),
    "ids stride": ((IDS.t(), 4, 2, []), "topk_ids: expected a contiguous"),
    "experts": ((IDS, 5, 2, []), "num_experts, ranks: expected a multiple .* got 5 and 2"),
    "no ranks": ((IDS, 4, 0, []), "num_experts, ranks: expected a multiple .* got 4 and 0"),
    "ranks": ((IDS, 512, 512, []), "num_experts, ranks: expected a multiple of 1 to 256"),
    "alike": ((IDS, 4, 2, [0] * 9), "alike: expected up to 8 numbers, got 9"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_arguments_are_named(case: str) -> None:
    args, message = BAD_MAPS[case]
    with pytest.raises(ValueError, match=message):
        dispatch.dispatch_maps(*args)


def test_bad_routing_arguments_are_named() -> None:
    weights, rows, out = torch.zeros(4, 2), IDS.int(), torch.zeros(128, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="topk_weights: expected torch.float32"):
        dispatch.dispatch_routing(IDS, weights.double(), rows, 2, out)
    with pytest.raises(ValueError, match="out: expected int32 rows of 4 neighbours"):
        dispatch.dispatch_routing(IDS, weights, rows, 2, out[:, :3])
