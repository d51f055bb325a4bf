"""observe_fp8: which tensors it shows, and that it changes and costs nothing."""

from __future__ import annotations

import pytest
import torch

from fp8moe import quant
from fp8moe.config import FP8Config
from fp8moe.functional import grouped_linear, observe, observe_fp8


def seen(layer, config):
    shown = []
    with observe_fp8(lambda kind, t: shown.append((kind, t))):
        result = layer.run(config)
    return shown, result


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (FP8Config(), ["x", "w13", "act", "w2", "dy", "dh"]),
        (FP8Config(save="fp8"), ["x", "w13", "act", "w2", "h", "dy", "dh"]),
        (FP8Config(save="recompute"), ["x", "w13", "act", "w2", "dy", "dh"]),
        (FP8Config(wgrad="bf16"), ["x", "w13", "act", "w2", "dy", "dh"]),
        (FP8Config(dgrad="bf16", wgrad="bf16"), ["x", "w13", "act", "w2"]),
        (FP8Config.bf16(), []),
    ],
)
def test_kinds(make_layer, config, kinds):
    layer = make_layer()
    shown, result = seen(layer, config)
    assert [kind for kind, _ in shown] == kinds
    assert all(result.equal(layer.run(config)).values())


def test_values_are_those_of_the_layer(make_layer):
    layer = make_layer()
    shown = dict(seen(layer, FP8Config())[0])

    def bits(t):
        return t.data.view(torch.uint8)

    assert torch.equal(bits(shown["x"]), bits(quant.per_token(layer.x)))
    assert torch.equal(bits(shown["dy"]), bits(quant.per_token(layer.dy)))
    assert torch.equal(bits(shown["w2"]), bits(quant.per_block(layer.w2)))
    # One row per slot, no padding: act of token t, slot k is row t * K + k.
    slots = layer.ids.numel()
    for kind, width in (("act", 128), ("dh", 256)):
        data, scale = shown[kind]
        assert data.shape == (slots, width) and scale.shape == (slots, width // 128)
    x, w13 = layer.x[3].double(), layer.w13[layer.ids[3, 1]].double()
    gate, up = (x @ w13.t()).chunk(2)
    act = layer.weights[3, 1] * torch.nn.functional.silu(gate) * up
    row = quant.dequantize(quant.FP8Tensor(*(t[7:8] for t in shown["act"])))[0]
    assert torch.nn.functional.cosine_similarity(act, row.double(), dim=0) > 0.99


def test_cached_weights_are_shown_at_every_use(make_layer):
    layer = make_layer()
    shown = []
    leaves = layer.leaves()
    with observe_fp8(lambda kind, t: shown.append(kind)):
        for _ in range(2):
            layer.forward(*leaves, FP8Config())
    assert shown.count("w13") == shown.count("w2") == 2


def test_grouped_linear_kinds(device):
    x = torch.randn(64, 128, device=device, requires_grad=True)
    w = torch.randn(1, 128, 128, device=device, requires_grad=True)
    ends = torch.tensor([64], dtype=torch.int32, device=device)
    kinds = []
    with observe_fp8(lambda kind, t: kinds.append(kind)):
        grouped_linear(x, w, ends).sum().backward()
    assert kinds == ["x", "w", "dy"]


def test_nesting_and_leaving(make_layer):
    layer = make_layer(tokens=8)
    outer, inner = [], []
    with observe_fp8(lambda kind, t: outer.append(kind)):
        with observe_fp8(lambda kind, t: inner.append(kind)):
            layer.run()
        layer.run()
    layer.run()
    assert len(outer) == 2 * len(inner) == 12
    with pytest.raises(KeyError), observe_fp8(lambda kind, t: None):
        raise KeyError
    assert observe._callbacks == ()


def test_same_callback_twice_is_removed_once(make_layer):
    kinds = []

    def callback(kind, t):
        kinds.append(kind)

    layer = make_layer(tokens=8)
    with observe_fp8(callback):
        with observe_fp8(callback):
            pass
        layer.run()
    assert len(kinds) == 6
