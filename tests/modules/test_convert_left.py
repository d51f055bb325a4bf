"""replace_experts: what it leaves as it is, and why; layers that are stacked already."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from moe_blocks import MIXTRAL, MLP, E, H, I, K, MixtralBlock, Model, QwenBlock
from torch import nn

import fp8moe
from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.modules.stacked import StackedExperts

# ---------------------------------------------------------------------------- what is left, and why


class Scaled(MixtralBlock):
    def weights(self, logits):
        p, ids = super().weights(logits)
        return 1.1 * p, ids


class SecondBest(MixtralBlock):
    def weights(self, logits):
        p, ids = logits.softmax(-1).topk(K + 1, dim=-1)
        p, ids = p[:, 1:], ids[:, 1:]
        return p / p.sum(-1, keepdim=True), ids


class Clamped(MLP):
    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(x).clamp(max=7)) * up(x))


def with_(change, block=MixtralBlock, **expert):
    made = block(**expert)
    change(made)
    return made


def set_expert(e, expert):
    return lambda block: block.experts.__setitem__(e, expert)


def hooked(block):
    block.experts[0].register_forward_hook(lambda *_: None)


LEFT = {
    "gelu": (lambda: MixtralBlock(activation=nn.GELU()), "act_fn is GELU; expected SiLU"),
    "bias": (lambda: QwenBlock(bias=True), "gate_proj has a bias"),
    "clamp": (
        lambda: with_(lambda b: [set_expert(e, Clamped(MIXTRAL))(b) for e in range(E)]),
        r"Clamped does not compute w2\(silu\(w1 x\) \* w3 x\) on inputs of size 50",
    ),
    "swapped names": (
        lambda: with_(
            lambda b: [set_expert(e, Swapped())(b) for e in range(E)], block=MixtralBlock
        ),
        "on inputs of size 1",
    ),
    "another class": (lambda: with_(set_expert(2, Clamped(MIXTRAL))), "different classes"),
    "another size": (
        lambda: with_(set_expert(1, MLP(MIXTRAL, intermediate=128))),
        r"expert 1: w1.weight is \(128, 128\); expected \(256, 128\)",
    ),
    "unsupported size": (lambda: MixtralBlock(intermediate=200), "multiple of 16, got 200"),
    "tied": (lambda: with_(lambda b: set_expert(1, b.experts[0])(b)), "in the list twice"),
    "mixed dtypes": (lambda: with_(lambda b: b.experts[1].bfloat16()), "different dtypes"),
    "mixed flags": (
        lambda: with_(lambda b: b.experts[1].requires_grad_(False)),
        "different requires_grad",
    ),
    "double": (lambda: MixtralBlock().double(), "float64; expected bfloat16"),
    "scaled": (Scaled, "Scaled computes something else than top-k routing"),
    "second best": (SecondBest, "something else than top-k routing"),
    "wrong norm": (
        lambda: with_(lambda b: setattr(b, "norm_topk_prob", False)),
        "something else than top-k routing",
    ),
    "jitter": (lambda: with_(lambda b: setattr(b, "jitter_noise", 0.1)), "jitter_noise = 0.1"),
    "extra module": (
        lambda: with_(lambda b: setattr(b, "norm", nn.LayerNorm(H))),
        r"MixtralBlock.norm \(LayerNorm\) has no known place",
    ),
    "no gate": (lambda: with_(lambda b: delattr(b, "gate")), "has no gate or router"),
    "no top_k": (lambda: with_(lambda b: delattr(b, "top_k")), "has no top_k"),
    "hooks": (lambda: with_(hooked), "MLP has hooks"),
    "not swiglu": (
        lambda: with_(lambda b: [set_expert(e, nn.Linear(H, H))(b) for e in range(E)]),
        "Linear has no gate_proj/up_proj/down_proj or w1/w3/w2",
    ),
    "meta": (lambda: MixtralBlock().to("meta"), "meta device"),
}


class Swapped(MLP):
    """w3 is the gate here: the names say otherwise."""

    def __init__(self):
        super().__init__(MIXTRAL)

    def forward(self, x):
        return self.w2(F.silu(self.w3(x)) * self.w1(x))


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_fit_is_left_and_named(name, capsys):
    make, message = LEFT[name]
    block = make()
    model = Model(MixtralBlock(), block)
    before = dict(block.named_parameters())
    modes = [module.training for module in block.modules()]
    report = fp8moe.replace_experts(model)
    assert [entry.name for entry in report.replaced] == ["layers.0"]
    assert [entry.name for entry in report.left] == ["layers.1"]
    assert model.layers[1] is block
    assert dict(block.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in block.named_parameters())
    assert [module.training for module in block.modules()] == modes
    assert re.search(message, report.left[0].reason), report.left[0].reason
    assert report.left[0].reason in capsys.readouterr().out


def test_a_shared_block_is_replaced_everywhere():
    block = MixtralBlock()
    model = Model(block, block)
    report = fp8moe.replace_experts(model)
    assert len(report.replaced) == 1
    assert model.layers[0] is model.layers[1] is not block


def test_replacing_twice_does_nothing_more():
    model = Model(MixtralBlock())
    fp8moe.replace_experts(model)
    block = model.layers[0]
    report = fp8moe.replace_experts(model)
    assert not report.replaced and not report.left and model.layers[0] is block


def test_own_modules_are_no_candidates():
    moe = fp8moe.MoE(fp8moe.Router(H, E, K), fp8moe.Experts(E, H, I))
    report = fp8moe.replace_experts(nn.Sequential(moe))
    assert not report.replaced and not report.left


def test_the_root_cannot_be_swapped():
    report = fp8moe.replace_experts(MixtralBlock())
    assert "pass a module that contains it" in report.left[0].reason


def test_equal_layers_share_a_line():
    model = Model(*(MixtralBlock() for _ in range(3)), MixtralBlock(activation=nn.GELU()))
    text = str(fp8moe.replace_experts(model))
    assert text.splitlines() == [
        "replace_experts: 3 of 4 expert layers replaced",
        "  replaced: 3 x MixtralBlock: 4 experts 128 x 256, w1/w3/w2 stacked "
        "(layers.0 to layers.2)",
        "  left as it is: 1 x MixtralBlock: MLP.act_fn is GELU; expected SiLU (layers.3)",
    ]


def test_a_wrong_config_is_refused_first():
    model = Model(MixtralBlock())
    with pytest.raises(ValueError, match="config: expected an FP8Config, got 'fp8'"):
        fp8moe.replace_experts(model, config="fp8")
    assert isinstance(model.layers[0], MixtralBlock)


# ---------------------------------------------------------------- weights that are stacked already


class Stacked(nn.Module):
    """Experts that are called with a finished routing."""

    def __init__(self, activation=None):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H) * 0.05)
        self.down_proj = nn.Parameter(torch.randn(E, H, I) * 0.05)
        self.act_fn = activation or nn.SiLU()

    def halves(self, h):
        return h.chunk(2, dim=-1)

    def forward(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e in range(E):
            gate, up = self.halves(F.linear(x, self.gate_up_proj[e]))
            weight = (weights * (ids == e)).sum(-1, keepdim=True)
            y = y + weight * F.linear(self.act_fn(gate) * up, self.down_proj[e])
        return y


class Interleaved(Stacked):
    def halves(self, h):
        return h[..., 0::2], h[..., 1::2]


class UpFirst(Stacked):
    def halves(self, h):
        return h.chunk(2, dim=-1)[::-1]


class ClampedStack(Stacked):
    def halves(self, h):
        return h.clamp(-7, 7).chunk(2, dim=-1)


class Routes(Stacked):
    """Called with hidden states alone."""

    def forward(self, x):
        return x


class Fails(Stacked):
    def forward(self, x, ids, weights):
        raise RuntimeError("not like this")


class OtherNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, I, H))


class ParallelExperts(OtherNames):
    pass


def test_stacked_experts_keep_their_parameters():
    model = nn.Sequential(Stacked())
    old = model[0]
    report = fp8moe.replace_experts(model, config=FP8Config(save="fp8"))
    assert "gate_up_proj/down_proj kept" in str(report)
    new = model[0]
    assert isinstance(new, StackedExperts) and new.fp8_config.save == "fp8"
    assert new.gate_up_proj is old.gate_up_proj and new.down_proj is old.down_proj
    assert list(model.state_dict()) == ["0.gate_up_proj", "0.down_proj"]
    x = torch.randn(10, H)
    ids, weights = testing.random_topk(10, K, E, 0)
    expected = fp8moe.swiglu_experts(
        x, ids, weights, old.gate_up_proj, old.down_proj, config=FP8Config(save="fp8")
    )
    assert torch.equal(new(x, ids, weights), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": nn.GELU()}, "activation GELU; expected silu"),
        ({"act_fn": F.relu}, "activation relu"),
        ({"has_bias": True}, "biases"),
        ({"has_gate": False}, "without a gate"),
        ({"is_transposed": True}, "transposed"),
        ({"is_concatenated": False}, "interleaved"),
        ({"gate_up_proj": nn.Parameter(torch.zeros(E, I, H))}, r"gate_up_proj is \(4, 256, 128\)"),
        ({"gate_up_proj": None}, "gate_up_proj: NoneType; expected a 3-dim"),
        (
            {"down_proj": nn.Parameter(torch.zeros(E, H, I, dtype=torch.float64))},
            "down_proj in torch.float64",
        ),
    ],
)
def test_variants_of_stacked_experts_are_left(change, message):
    experts = Stacked()
    for name, value in change.items():
        if name == "act_fn":
            del experts.act_fn
        setattr(experts, name, value)
    model = nn.Sequential(experts)
    report = fp8moe.replace_experts(model)
    assert not report.replaced and model[0] is experts
    assert re.search(message, report.left[0].reason), report.left[0].reason


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Interleaved, "computes something else .* gate rows, then up rows"),
        (UpFirst, "computes something else"),
        (ClampedStack, "computes something else .* tokens of size 50"),
        (Routes, r"expected forward\(hidden_states, .*, got forward\(x\)"),
        (Fails, r"forward\(.*\) raises RuntimeError.'not like this'"),
    ],
)
def test_code_that_computes_something_else_is_left_and_not_frozen(kind, message):
    model = nn.Sequential(kind())
    experts = model[0]
    report = fp8moe.replace_experts(model)
    assert not report.replaced and model[0] is experts and experts.training
    assert re.match(message, report.left[0].reason), report.left[0].reason
    with pytest.raises(ValueError, match=f"0: {kind.__name__}: {message}"):
        fp8moe.freeze_experts(model)
    assert model[0] is experts


def test_stacks_under_other_names_are_reported():
    model = nn.Sequential(ParallelExperts(), OtherNames(), nn.Conv1d(H, H, 3))
    (left,) = fp8moe.replace_experts(model).left
    expected = "stacked weights (weight) are not called gate_up_proj and down_proj"
    assert (left.name, left.reason) == ("0", expected)
