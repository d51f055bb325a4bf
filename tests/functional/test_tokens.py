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


def test_saved_scales_get_their_strides_back(device):
    plain = Tokens(torch.randn(10, 256).bfloat16().to(device))
    data, scale = plain.fp8(True)
    again = Tokens.saved(data, scale.contiguous())
    assert again.scale.stride() == scale.stride() and torch.equal(again.scale, scale)
    assert Tokens.saved(plain.data, None) == plain
