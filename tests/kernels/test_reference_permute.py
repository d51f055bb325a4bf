"""Routing maps against a stable argsort, and row movements against plain indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe import quant, testing
from fp8moe.kernels import reference
from fp8moe.kernels.fp8tensor import FLOOR_SCALE_POW2, padded_capacity


@st.composite
def routings(draw: Any) -> tuple[torch.Tensor, int]:
    """topk_ids with dropped slots, empty experts and repeated ids; and num_experts."""
    experts = draw(st.integers(1, 6))
    tokens, topk = draw(st.integers(0, 60)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["any", "one", "dropped"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    ids = torch.randint(experts + 1, (tokens, topk), generator=generator)
    if kind == "one":
        ids[:] = draw(st.integers(0, experts - 1))
    elif kind == "dropped":
        ids[:] = experts
    return ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), experts


@given(routings())
def test_route_is_a_stable_argsort_with_padded_groups(routing: tuple[torch.Tensor, int]) -> None:
    ids, experts = routing
    slots = ids.flatten().tolist()
    row_of_slot, slot_of_row, group_ends, counts = reference.route(ids, experts)
    for t in (row_of_slot, slot_of_row, group_ends, counts):
        assert t.dtype == torch.int32
    assert slot_of_row.shape == (padded_capacity(len(slots), experts),)

    expected = []
    for expert in range(experts):
        mine = [i for i, e in enumerate(slots) if e == expert]
        assert counts[expert] == len(mine)
        expected += mine + [-1] * (-len(mine) % 128)
        assert group_ends[expert] == len(expected)
    expected += [-2] * (len(slot_of_row) - len(expected))
    assert slot_of_row.tolist() == expected

    inverse = {slot: row for row, slot in enumerate(expected) if slot >= 0}
    assert row_of_slot.flatten().tolist() == [inverse.get(i, -1) for i in range(len(slots))]
    assert row_of_slot.shape == ids.shape


@pytest.mark.parametrize(("bad", "index"), [(-1, 3), (5, 2), (100, 0)])
def test_route_names_an_id_out_of_range(bad: int, index: int) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int64)
    ids.view(-1)[index] = bad
    with pytest.raises(ValueError, match=rf"0 <= id <= 4 .* got {bad} at flat index {index}"):
        reference.route(ids, 4)


def test_route_without_experts_or_tokens() -> None:
    row_of_slot, slot_of_row, group_ends, counts = reference.route(torch.zeros(3, 2).long(), 0)
    assert (row_of_slot == -1).all() and (slot_of_row == -2).all() and len(slot_of_row) == 128
    assert group_ends.numel() == counts.numel() == 0
    row_of_slot, slot_of_row, group_ends, _ = reference.route(torch.zeros(0, 2).long(), 3)
    assert row_of_slot.shape == (0, 2) and (slot_of_row == -2).all() and not group_ends.any()


@given(routings(), st.integers(1, 20))
def test_gather_sum_undoes_permute(routing: tuple[torch.Tensor, int], hidden: int) -> None:
    ids, experts = routing
    tokens, topk = ids.shape
    row_of_slot, slot_of_row, group_ends, _ = reference.route(ids, experts)
    x = torch.randint(-8, 8, (tokens, hidden)).bfloat16()
    rows = reference.permute_rows(x, row_of_slot, slot_of_row)
    used = int(group_ends[-1])
    for row, slot in enumerate(slot_of_row[:used].tolist()):
        expected = x[slot // topk] if slot >= 0 else torch.zeros(hidden)
        assert torch.equal(rows[row].float(), expected.float())
    testing.poison(rows[used:])
    kept = (ids < experts).sum(1, keepdim=True)
    assert torch.equal(reference.gather_sum(rows, row_of_slot), (x * kept).bfloat16())


def test_gather_sum_adds_in_fp32_in_slot_order_and_rounds_once() -> None:
    # 1 + 2**-8 + 2**-8: partial sums in bf16 would lose both, each being half of its last place.
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8], [2.0**30], [-(2.0**30)]]).bfloat16()
    row_of_slot = torch.tensor([[0, 1, 2, -1], [3, 4, 0, 0], [0, 3, 4, -1], [-1, -1, -1, -1]])
    out = reference.gather_sum(rows, row_of_slot.int())
    assert out.flatten().tolist() == [1 + 2.0**-7, 2.0, 0.0, 0.0]
    assert not torch.signbit(out[3]).any()


def test_gather_slots_sums_partials_in_order() -> None:
    partials = torch.randn(3, 256)
    row_of_slot = torch.tensor([[5, -1], [255, 0]], dtype=torch.int32)
    out = reference.gather_slots(partials, row_of_slot)
    total = (partials[0] + partials[1]) + partials[2]
    assert torch.equal(out, torch.stack([total[[5, 0]] * torch.tensor([1, 0]), total[[255, 0]]]))
    assert reference.gather_slots(partials[:0], row_of_slot).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("hidden", [128, 200])
@pytest.mark.parametrize("kind", ["uniform", "one_hot"])
def test_fp8_permutations(kind: str, hidden: int, pow2: bool) -> None:
    tokens, topk, experts = 150, 3, 5
    ids, _ = testing.random_topk(tokens, topk, experts, seed=0, kind=kind, dropped=0.1)
    row_of_slot, slot_of_row, group_ends, _ = reference.route(ids, experts)
    x = torch.randn(tokens, hidden) * torch.exp2(torch.randint(-20, 20, (tokens, 1)))
    x8 = quant.per_token(x, pow2=pow2)
    used = int(group_ends[-1])
    slot = slot_of_row[:used]
    token = (slot // topk).clamp_min(0).long()

    data, scale = reference.permute_fp8(*x8, row_of_slot, slot_of_row)
    assert scale.stride() == (1, len(slot_of_row)) and scale.shape == (
        len(slot_of_row),
        x8.scale.shape[1],
    )
    taken = x8.data.view(torch.uint8)[token].masked_fill(slot[:, None] < 0, 0)
    assert torch.equal(data.view(torch.uint8)[:used], taken)
    assert torch.equal(
        scale[:used], x8.scale[token].masked_fill(slot[:, None] < 0, FLOOR_SCALE_POW2)
    )

    data_t, scale_t = reference.permute_fp8_to_channel(*x8, slot_of_row, topk, pow2, False)
    values = quant.dequantize(x8)[token].masked_fill(slot[:, None] < 0, 0)
    expected = quant.per_channel(values, group_ends, pow2=pow2)
    assert torch.equal(
        data_t.view(torch.uint8)[:, :used], expected.data.view(torch.uint8)[:, :used]
    )
    assert torch.equal(scale_t[:, : used // 128], expected.scale[:, : used // 128])
    assert data_t.shape == (hidden, len(slot_of_row)) and scale_t.stride()[0] == 1

    both = reference.permute_fp8_both(*x8, slot_of_row, topk, pow2)
    assert torch.equal(both[0].view(torch.uint8)[:used], data.view(torch.uint8)[:used])
    assert torch.equal(both[1][:used], scale[:used])
    assert torch.equal(both[2].view(torch.uint8)[:, :used], data_t.view(torch.uint8)[:, :used])
    assert torch.equal(both[3][:, : used // 128], scale_t[:, : used // 128])


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("pow2_in", [False, True])
def test_columns_with_block_scales(pow2_in: bool, pow2: bool) -> None:
    """The scale is the one of the block's maximum; values of the largest rows keep their bytes."""
    tokens, topk, experts = 150, 3, 5
    ids, _ = testing.random_topk(tokens, topk, experts, seed=0, dropped=0.1)
    _, slot_of_row, group_ends, _ = reference.route(ids, experts)
    used = int(group_ends[-1])
    slot = slot_of_row[:used]
    token = (slot // topk).clamp_min(0).long()
    x = torch.randn(tokens, 384) * torch.exp2(torch.randint(-9, 1, (tokens, 1)))
    x[:, 128:256] = 0
    x8 = quant.per_token(x, pow2=pow2_in)

    t = quant.FP8Tensor(*reference.permute_fp8_to_channel(*x8, slot_of_row, topk, pow2, True))
    assert t.data.shape == (384, len(slot_of_row)) and t.scale.is_contiguous()
    t = quant.FP8Tensor(t.data[:, :used], t.scale[:, : used // 128])
    rows = x[token].masked_fill(slot[:, None] < 0, 0)
    direct = quant.per_block(rows.t().contiguous(), pow2=pow2)
    if pow2_in <= pow2:  # a scale already rounded up stays so
        assert torch.equal(t.scale, direct.scale)
    else:
        assert (t.scale >= direct.scale).all() and (t.scale <= 2 * direct.scale).all()
    # Rounded twice, the second time relative to the block.
    exact = quant.dequantize(x8)[token].masked_fill(slot[:, None] < 0, 0).t()
    error = (quant.dequantize(t) - exact).abs()
    step = t.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert (error <= torch.maximum(exact.abs() * 2.0**-4, step * 2.0**-10)).all()
    wrong = quant.dequantize(quant.FP8Tensor(t.data, 1.1 * t.scale))
    assert ((wrong - exact).abs() > torch.maximum(exact.abs() * 2.0**-4, step * 2.0**-10)).any()
    if pow2_in and pow2:
        loud = (x8.scale[token, 0] == t.scale[0].repeat_interleave(128)) & (slot >= 0)
        assert loud.any()
        assert testing.same_bits(t.data[:128, loud], x8.data[token[loud], :128].t())


def test_column_conversion_shows_a_nan_row_in_its_blocks_only() -> None:
    x = torch.randn(200, 128)
    x[7, 3] = float("nan")
    ids = (torch.arange(200) // 100).view(200, 1)
    _, slot_of_row, _, _ = reference.route(ids, 2)
    args = (*quant.per_token(x), slot_of_row, 1, True)
    data, scale = reference.permute_fp8_to_channel(*args, True)
    nan = quant.dequantize(quant.FP8Tensor(data[:, :256], scale[:, :2])).isnan()
    assert nan[:, :128].all() and not nan[:, 128:].any()
    data, scale = reference.permute_fp8_to_channel(*args, False)
    nan = quant.dequantize(quant.FP8Tensor(data[:, :256], scale[:, :2])).isnan()
    assert nan[:, :128].all() and not nan[:, 128:].any()


def test_permutations_of_no_tokens() -> None:
    x8 = quant.per_token(torch.empty(0, 128))
    row_of_slot, slot_of_row, _, _ = reference.route(torch.zeros(0, 2).long(), 3)
    assert reference.permute_rows(torch.empty(0, 128), row_of_slot, slot_of_row).shape == (256, 128)
    data, scale, data_t, scale_t = reference.permute_fp8_both(*x8, slot_of_row, 2, True)
    assert data.shape == (256, 128) and scale.shape == (256, 1)
    assert data_t.shape == (128, 256) and scale_t.shape == (128, 2)
