"""replace_experts: same results, gradients and checkpoints as the blocks it replaces."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from moe_blocks import (
    BLOCKS,
    LLAMA,
    MIXTRAL,
    DeepSeekBlock,
    E,
    H,
    I,
    MixtralBlock,
    Model,
    QwenBlock,
    hidden,
)

import fp8moe
from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.modules import expert_list

GATES_DB = (23.0, 20.0, 22.0)
"""On y, dx and dw2 of a whole FP8 layer against FP32: two and three casts in a row, where one GEMM
alone has 27 and 26 dB."""


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
