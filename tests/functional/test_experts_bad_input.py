"""swiglu_experts: NaN and Inf stay visible where they belong; wrong arguments are named."""

from __future__ import annotations

import pytest
import torch

from fp8moe.config import FP8Config
from fp8moe.functional import swiglu_experts

# ------------------------------------------------------------------------------------- NaN and Inf


def test_nan_in_one_token_stays_in_that_token(make_layer):
    layer = make_layer()
    clean = layer.run()
    x = layer.x.clone()
    x[5, 3] = float("nan")
    result = layer.but(x=x).run()
    others = torch.arange(len(x), device=x.device) != 5
    assert result.y[5].isnan().all() and result.dx[5].isnan().any()
    assert torch.equal(result.y[others], clean.y[others])
    assert torch.equal(result.dx[others], clean.dx[others])
    touched = {int(e) for e in layer.ids[5]}
    for e in range(len(layer.w2)):
        assert bool(result.dw13[e].isnan().any()) == (e in touched)
        assert bool(result.dw2[e].isnan().any()) == (e in touched)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_output_gradient_is_seen_in_the_gradients(make_layer, value):
    layer = make_layer()
    dy = layer.dy.clone()
    dy[9, 100] = value
    result = layer.but(dy=dy).run()
    assert result.dx[9].isnan().all() and result.dprob[9].isnan().all()
    others = torch.arange(len(dy), device=dy.device) != 9
    assert not result.dx[others].isnan().any() and not result.dprob[others].isnan().any()
    assert result.dw2[layer.ids[9].long()].isnan().any()


def test_nan_in_a_weight_reaches_its_expert_only(make_layer):
    layer = make_layer()
    w2 = layer.w2.clone()
    w2[1, 0, 0] = float("nan")
    result = layer.but(w2=w2).run()
    assert torch.equal(result.y.isnan().any(1), (layer.ids == 1).any(1))


def test_nan_routing_weight(make_layer):
    layer = make_layer()
    weights = layer.weights.clone()
    weights[4, 1] = float("nan")
    result = layer.but(weights=weights).run()
    assert result.y[4].isnan().all() and int(result.y.isnan().any(1).sum()) == 1


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.update(x=a["x"].double()),
            r"x: expected torch.bfloat16 or .*, got torch.float64",
        ),
        (lambda a: a.update(x=a["x"][None]), r"x: expected shape \(T, H\), got \(1, 192, 256\)"),
        (lambda a: a.update(x=None), "x: expected a tensor, got NoneType"),
        (
            lambda a: a.update(topk_ids=a["topk_ids"].tolist()),
            "topk_ids: expected a tensor, got list",
        ),
        (
            lambda a: a.update(w2=torch.nn.Linear(256, 128)),
            "w2: expected a tensor, got Linear",
        ),
        (
            lambda a: a.update(w2=a["w2"][0]),
            r"w2: expected shape \(E, 256, I\), got \(256, 128\)",
        ),
        (
            lambda a: a.update(topk_ids=a["topk_ids"].float()),
            r"topk_ids: expected torch.int32 or torch.int64, got torch.float32",
        ),
        (
            lambda a: a.update(topk_ids=a["topk_ids"][1:]),
            r"topk_ids: expected shape \(192, K\), got \(191, 2\)",
        ),
        (
            lambda a: a.update(topk_weights=a["topk_weights"][:, :1]),
            r"topk_weights: expected shape \(192, 2\), got \(192, 1\)",
        ),
        (
            lambda a: a.update(
                topk_ids=a["topk_ids"][:, :0], topk_weights=a["topk_weights"][:, :0]
            ),
            r"topk_ids: K: expected at least 1, got 0",
        ),
        (
            lambda a: a.update(w13=a["w13"][:, :-2].contiguous()),
            r"w13: expected shape \(4, 256, 256\), got \(4, 254, 256\)",
        ),
        (
            lambda a: a.update(w13=a["w13"].transpose(1, 2)),
            r"w13: expected a contiguous tensor, got strides \(65536, 1, 256\)",
        ),
        (
            lambda a: a.update(
                w2=a["w2"][..., :100].contiguous(), w13=a["w13"][:, :200].contiguous()
            ),
            r"w2: I, in FP8: expected a multiple of 16, got 100",
        ),
        (
            lambda a: a.update(
                x=a["x"][:, :200],
                w2=a["w2"][:, :200].contiguous(),
                w13=a["w13"][..., :200].contiguous(),
            ),
            r"x: H, in FP8: expected a multiple of 16, got 200",
        ),
        (
            lambda a: a.update(topk_ids=a["topk_ids"] + 1),
            r"topk_ids: expected 0 <= id <= 4 .*, got 5",
        ),
        (lambda a: a["topk_ids"].fill_(-1), r"topk_ids: expected 0 <= id <= 4 .*, got -1"),
        (lambda a: setattr(a["w2"], "main_grad", torch.zeros(3)), r"w2\.main_grad: expected shape"),
        (
            lambda a: setattr(a["w13"], "main_grad", torch.zeros(4, 256, 256).bfloat16()),
            r"w13\.main_grad: expected torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_bad_input_is_named(make_layer, device, change, message):
    if device.type != "cpu":
        pytest.skip("the same checks; ids are checked on the device")
    layer = make_layer()
    x, weights, w13, w2 = layer.leaves()
    ids = torch.where(layer.ids == 0, 4, layer.ids)
    arguments = {"x": x, "topk_ids": ids, "topk_weights": weights, "w13": w13, "w2": w2}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        swiglu_experts(**arguments)


def test_sizes_of_16_are_for_fp8_only(make_layer):
    layer = make_layer(hidden=72, inner=40)
    assert layer.run(FP8Config.bf16()).y.shape == (192, 72)
    with pytest.raises(ValueError, match="x: H, in FP8: expected a multiple of 16, got 72"):
        layer.run(FP8Config(dgrad="bf16", fprop="bf16"))


def test_a_config_that_is_none_is_named(make_layer):
    layer = make_layer()
    with pytest.raises(ValueError, match="config: expected an FP8Config, got 'fp8'"):
        swiglu_experts(layer.x, layer.ids, layer.weights, layer.w13, layer.w2, config="fp8")
