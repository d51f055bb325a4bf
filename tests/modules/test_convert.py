"""replace_experts on MoE blocks as people write them: same results and checkpoints, or refusal."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp8moe
from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.modules import expert_list
from fp8moe.modules.stacked import StackedExperts

E, K, H, I = 4, 2, 128, 256  # noqa: E741
GATES_DB = (23.0, 20.0, 22.0)
"""On y, dx and dw2 of a whole FP8 layer against FP32: two and three casts in a row, where one GEMM
alone has 27 and 26 dB."""


class MLP(nn.Module):
    """A SwiGLU expert with names of one's own choice for its gate, up and down projection."""

    def __init__(self, names, hidden=H, intermediate=I, activation=None, bias=False):
        super().__init__()
        self.names = names
        for name, (n, k) in zip(
            names, [(intermediate, hidden)] * 2 + [(hidden, intermediate)], strict=True
        ):
            setattr(self, name, nn.Linear(k, n, bias=bias))
        self.act_fn = activation or nn.SiLU()

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


LLAMA, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


def loop(experts, x, ids, weights):
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(ids == e)
        if len(token):
            y.index_add_(0, token, (expert(x[token]) * weights[token, slot, None]).to(y.dtype))
    return y


class MixtralBlock(nn.Module):
    """Linear gate, renormalized top-k of the softmax, (y, logits)."""

    names = MIXTRAL

    def __init__(self, **expert):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(MLP(self.names, **expert) for _ in range(E))
        self.top_k = K

    def weights(self, logits):
        p, ids = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return p / p.sum(-1, keepdim=True), ids

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, H)
        logits = self.gate(x)
        p, ids = self.weights(logits)
        y = loop(self.experts, x, ids, p.to(x.dtype))
        return y.reshape(hidden_states.shape), logits


class QwenBlock(MixtralBlock):
    """Scores as they are, and a shared expert behind a sigmoid."""

    names = LLAMA

    def __init__(self, **expert):
        super().__init__(**expert)
        self.norm_topk_prob = False
        self.shared_expert = MLP(LLAMA)
        self.shared_expert_gate = nn.Linear(H, 1, bias=False)

    def weights(self, logits):
        p, ids = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return p, ids

    def forward(self, hidden_states):
        y, logits = super().forward(hidden_states)
        shared = self.shared_expert_gate(hidden_states).sigmoid() * self.shared_expert(
            hidden_states
        )
        return y + shared, logits


class SigmoidGate(nn.Module):
    """Decides ids and weights itself, and has a balance loss in training."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H) * 0.1)
        self.bias = nn.Parameter(torch.zeros(E))

    def forward(self, hidden_states):
        batch, length, hidden = hidden_states.shape
        scores = F.linear(hidden_states.reshape(-1, hidden).float(), self.weight.float()).sigmoid()
        ids = (scores.detach() + self.bias).topk(K, dim=-1).indices
        weights = scores.gather(1, ids)
        loss = scores.square().sum() if self.training else None
        return ids, 2.5 * weights / weights.sum(-1, keepdim=True), loss


class WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, loss):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, torch.ones(())


class DeepSeekBlock(nn.Module):
    """A gate module with an auxiliary loss, and shared experts for every token; returns y."""

    def __init__(self, **expert):
        super().__init__()
        self.experts = nn.ModuleList(MLP(LLAMA, **expert) for _ in range(E))
        self.gate = SigmoidGate()
        self.shared_experts = MLP(LLAMA)

    def forward(self, hidden_states):
        ids, weights, loss = self.gate(hidden_states)
        x = hidden_states.reshape(-1, H)
        y = loop(self.experts, x, ids, weights.to(x.dtype))
        if loss is not None:
            y = WithLoss.apply(y, loss)
        return y.reshape(hidden_states.shape) + self.shared_experts(hidden_states)


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


BLOCKS = [MixtralBlock, QwenBlock, DeepSeekBlock]


def hidden(device="cpu", dtype=torch.float32):
    return torch.randn(2, 24, H, device=device, dtype=dtype, requires_grad=True)


def gradients(model, x):
    model.zero_grad()
    x.grad = None
    y = model(x)
    (y[0] if isinstance(y, tuple) else y).square().mean().backward()
    return y, x.grad.clone()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_block(device, block, dtype, capsys):
    model = Model(block()).to(device, dtype)
    old = copy.deepcopy(model)
    report = fp8moe.replace_experts(model, config=FP8Config.bf16())
    assert [entry.name for entry in report.replaced] == ["layers.0"] and not report.left
    entry = report.replaced[0]
    assert (entry.num_experts, entry.hidden_size, entry.intermediate_size) == (E, H, I)
    assert "1 of 1 expert layers replaced" in capsys.readouterr().out

    x = hidden(device, dtype)
    expected, expected_dx = gradients(old.layers[0], x)
    got, dx = gradients(model.layers[0], x)
    if isinstance(expected, tuple):
        assert torch.equal(got[1], expected[1])
        got, expected = got[0], expected[0]
    assert got.dtype == expected.dtype
    assert testing.sqnr_db(got, expected) > 38
    assert testing.sqnr_db(dx, expected_dx) > 35
    assert_router_gradients(model, old, 35)


def assert_router_gradients(model, old, gate):
    theirs = dict(old.named_parameters())
    shared = {name for name, _ in model.named_parameters()} & set(theirs)
    assert any(".gate." in name for name in shared)
    for name, p in model.named_parameters():
        if name in shared and theirs[name].grad is not None:
            assert testing.sqnr_db(p.grad, theirs[name].grad) > gate, name


@pytest.mark.parametrize("block", BLOCKS)
def test_fp8_passes_the_gate_and_a_planted_error_does_not(device, block):
    model = Model(block()).to(device)
    old = copy.deepcopy(model).layers[0]
    fp8moe.replace_experts(model)
    new = model.layers[0]
    x, dy = hidden(device), torch.randn(2, 24, H, device=device)

    def run(layer, dw):
        x.grad = None
        layer.zero_grad()
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(dy)
        return y.detach(), x.grad.clone(), dw()

    down = LLAMA[2] if block is not MixtralBlock else MIXTRAL[2]
    expected = run(old, lambda: torch.stack([getattr(e, down).weight.grad for e in old.experts]))

    def errors():
        results = run(new, lambda: new.experts.w2.grad)
        return [testing.sqnr_db(*pair) for pair in zip(results, expected, strict=True)]

    good = errors()
    assert all(db > gate for db, gate in zip(good, GATES_DB, strict=True)), good
    with torch.no_grad():
        new.experts.w13[1, I:].neg_()
    bad = errors()
    assert all(db < gate for db, gate in zip(bad, GATES_DB, strict=True)), bad


def test_the_balance_loss_of_a_router_reaches_it():
    torch.manual_seed(1)
    model = Model(DeepSeekBlock())
    fp8moe.replace_experts(model, config=FP8Config.bf16())
    gate = model.layers[0].gate
    x = hidden()
    model.layers[0](x).sum().backward()
    with_loss = gate.weight.grad.clone()
    gate.weight.grad = None
    gate.eval()
    model.layers[0](x).sum().backward()
    gate.weight.requires_grad_()
    loss = gate.train()(x)[2]
    (alone,) = torch.autograd.grad(loss, gate.weight)
    torch.testing.assert_close(with_loss, gate.weight.grad + alone, rtol=1e-4, atol=1e-5)
    assert alone.norm() > 1e-2 * gate.weight.grad.norm()


@pytest.mark.parametrize("block", BLOCKS)
def test_state_dicts_go_both_ways(block):
    model, old = Model(block()), Model(block())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fp8moe.replace_experts(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    old.load_state_dict(after)
    assert all(torch.equal(t, before[name]) for name, t in old.state_dict().items())

    other = block()
    model.load_state_dict(Model(other).state_dict())
    gate, _, down = other.experts[2].names
    experts = model.layers[0].experts
    assert torch.equal(experts.w13[2, :I], getattr(other.experts[2], gate).weight)
    assert torch.equal(experts.w2[2], getattr(other.experts[2], down).weight)


def test_loading_invalidates_the_cached_fp8_weights():
    model = Model(MixtralBlock())
    fp8moe.replace_experts(model)
    x = hidden()
    first = model(x)
    changed = {name: 2 * t for name, t in model.state_dict().items()}
    model.load_state_dict(changed)
    assert not torch.allclose(model(x), first, rtol=0.05)
    fresh = Model(MixtralBlock())
    fresh.load_state_dict(changed)
    fp8moe.replace_experts(fresh)
    assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.experts.1.w3.weight"), "Missing.*experts.1.w3.weight"),
        (lambda s: s.update({"layers.0.experts.4.w1.weight": 0}), "Unexpected.*experts.4.w1"),
        (
            lambda s: s.update({"layers.0.experts.0.w2.weight": torch.zeros(3, 4)}),
            r"size mismatch for layers.0.experts.0.w2.weight: expected \(128, 256\), got \(3, 4\)",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit(change, message):
    model = Model(MixtralBlock())
    fp8moe.replace_experts(model)
    state = model.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        model.load_state_dict(state)


def test_assigning_a_state_dict_is_refused():
    model = Model(MixtralBlock())
    fp8moe.replace_experts(model)
    with pytest.raises(RuntimeError, match="assign=True"):
        model.load_state_dict(model.state_dict(), assign=True)


def test_weights_are_held_once():
    model = Model(MixtralBlock())
    block = model.layers[0]
    fp8moe.replace_experts(model)
    experts = model.layers[0].experts
    storage = experts.w13.untyped_storage().data_ptr()
    assert block.experts[3].w1.weight.untyped_storage().data_ptr() == storage
    assert sum(p.numel() for p in experts.parameters()) == E * 3 * H * I


def test_trains_with_an_optimizer_made_afterwards():
    model = Model(QwenBlock(), DeepSeekBlock())
    fp8moe.replace_experts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, target = hidden().detach(), torch.randn(2, 24, H)
    losses = []
    for _ in range(12):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_flags_and_modes_are_kept():
    model = Model(MixtralBlock()).eval()
    model.requires_grad_(False)
    model.layers[0].gate.train()
    fp8moe.replace_experts(model)
    block = model.layers[0]
    assert not block.training and block.gate.training and not block.experts.training
    assert not any(p.requires_grad for p in block.parameters())
    assert pickle.loads(pickle.dumps(block)).experts.num_experts == E


def test_compiles(device):
    model = Model(QwenBlock(), DeepSeekBlock()).to(device)
    fp8moe.replace_experts(model)
    x = hidden(device)
    expected, dx = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, compiled_dx = gradients(compiled, x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled_dx, dx)


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


def test_nothing_is_half_replaced_when_stacking_fails(monkeypatch):
    model = Model(MixtralBlock(), QwenBlock(), DeepSeekBlock())
    blocks = list(model.layers)
    x = hidden()
    expected = model(x)
    stack = expert_list.ListedExperts.__init__
    calls = []

    def fails_at_the_second(*arguments):
        stack(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(expert_list.ListedExperts, "__init__", fails_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        fp8moe.replace_experts(model)
    assert all(a is b for a, b in zip(model.layers, blocks, strict=True))
    assert torch.equal(model(x), expected)
    monkeypatch.undo()
    assert len(fp8moe.replace_experts(model).replaced) == 3


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

    def forward(self, x, ids, weights):
        raise AssertionError("replaced in these tests")


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
