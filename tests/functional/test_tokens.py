"""Tokens on their way to expert order: the same bits whichever way they take."""

from __future__ import annotations

import pytest
import torch

from fp8moe import testing
from fp8moe.functional import tokens
from fp8moe.functional.tokens import Tokens
from fp8moe.kernels import reference


@pytest.mark.parametrize("topk", [1, tokens.ONE_PASS_TOPK, tokens.ONE_PASS_TOPK + 1, 8])
@pytest.mark.parametrize("pow2", [True, False])
def test_high_precision_tokens_are_their_fp8_ones(device, topk, pow2, monkeypatch):
    one_pass: list[int] = []
    cast_permute_to_channel = tokens.cast_permute_to_channel

    def noticed(*args):
        one_pass.append(args[2])
        return cast_permute_to_channel(*args)

    monkeypatch.setattr(tokens, "cast_permute_to_channel", noticed)
    ids, _ = testing.random_topk(70, topk, 9, 0, dropped=0.1)
    rows, slots, _, _ = (t.to(device) for t in reference.route(ids, 9))
    real, used = slots >= 0, int((slots != -2).sum())
    plain = Tokens(torch.randn(70, 384).bfloat16().to(device))
    fp8 = Tokens(*plain.fp8(pow2))
    assert testing.same_bits(fp8.data, fp8.fp8(pow2).data)

    for a, b in zip(plain.rows(rows, slots, pow2), fp8.rows(rows, slots, pow2), strict=True):
        assert testing.same_bits(a[real], b[real])
    columns = [t.columns(slots, topk, pow2, block=False) for t in (plain, fp8)]
    blocks = [t.columns(slots, topk, pow2, block=True) for t in (plain, fp8)]
    both = [t.both(slots, topk, pow2) for t in (plain, fp8)]
    assert blocks[0].scale.shape == (3, len(slots) // 128)
    for a, b in ((*columns,), (*blocks,), (both[0][1], both[1][1]), (columns[0], both[0][1])):
        assert testing.same_bits(a.data[:, :used], b.data[:, :used])
        assert testing.same_bits(a.scale[:, : used // 128], b.scale[:, : used // 128])
    for a, b in zip(both[0][0], both[1][0], strict=True):
        assert testing.same_bits(a[real], b[real])
    assert one_pass == ([topk, topk] if topk <= tokens.ONE_PASS_TOPK else [])


def test_strides_change_nothing(device):
    """What comes in a message has rows that are apart, what hooks saved has other strides."""
    ids = torch.randint(0, 3, (10, 2))
    row_of_slot, slot_of_row, ends, _ = (t.to(device) for t in reference.route(ids, 3))
    used = int(ends[-1])
    data, scale = Tokens(torch.randn(10, 256).bfloat16().to(device)).fp8(True)
    apart = torch.zeros((10, 320), dtype=torch.uint8, device=device)
    apart = apart.view(data.dtype)[:, :256].copy_(data)
    tokens = [Tokens(data, scale), Tokens(apart, scale.contiguous())]
    assert apart.stride() != data.stride() and tokens[1].scale.stride() != scale.stride()
    rows = [t.rows(row_of_slot, slot_of_row, True) for t in tokens]
    columns = [t.columns(slot_of_row, 2, True, block=block) for block in (0, 1) for t in tokens]
    both = [t.both(slot_of_row, 2, True) for t in tokens]
    for a, b in (rows, (both[0][0], both[1][0])):
        assert testing.same_bits(a.data[:used], b.data[:used])
        assert testing.same_bits(a.scale[:used], b.scale[:used])
    for a, b in (columns[:2], columns[2:], (both[0][1], both[1][1])):
        assert testing.same_bits(a.data[:, :used], b.data[:, :used])
        assert testing.same_bits(a.scale[:, : used // 128], b.scale[:, : used // 128])
