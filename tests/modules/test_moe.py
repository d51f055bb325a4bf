"""MoE: the sum of its parts, where the auxiliary loss has its gradient, load statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fp8moe.config import FP8Config
from fp8moe.modules import Experts, MoE, Router, SharedExperts

E, K, H, I = 4, 2, 128, 128  # noqa: E741


def make(device, *, shared=None, config=None, **router) -> MoE:
    torch.manual_seed(1)
    router = {"balance_loss_coeff": 0.1, "z_loss_coeff": 0.01, **router}
    return MoE(
        Router(H, E, K, device=device, **router),
        Experts(E, H, I, config=config, device=device),
        None if shared is None else SharedExperts(H, 64, gated=shared, device=device),
    )


def hidden(device, dtype=torch.bfloat16):
    return torch.randn(2, 30, H, device=device).to(dtype)


@pytest.mark.parametrize("shared", [None, False, True])
def test_is_the_sum_of_its_parts(device, shared):
    moe, x = make(device, shared=shared), hidden(device, torch.float32)
    y, aux_loss = moe(x)
    flat = x.reshape(-1, H)
    routed = moe.router(flat)
    expected = moe.experts(flat, routed.topk_ids, routed.topk_weights)
    if shared is not None:
        m = moe.shared_experts
        gate, up = F.linear(flat, m.w13.weight).chunk(2, dim=1)
        part = F.linear(F.silu(gate) * up, m.w2.weight)
        expected = expected + (torch.sigmoid(flat @ m.gate.weight.t()) * part if shared else part)
    torch.testing.assert_close(y, expected.view_as(x))
    assert torch.equal(aux_loss, routed.balance_loss + routed.z_loss)
    assert torch.equal(moe.last_load, routed.num_tokens_per_expert)


@pytest.mark.parametrize("run", ["plain", "checkpoint", "compiled", "compiled checkpoint"])
def test_load_is_that_of_the_last_forward(device, run):
    torch.compiler.reset()
    moe = make(device)
    assert not moe.last_load.any()
    for _ in range(2):
        x = hidden(device)
        RUNS[run](moe, x).aux_loss.backward()
        expected = moe.router(x.view(-1, H)).num_tokens_per_expert
        assert torch.equal(moe.last_load, expected) and int(expected.sum()) == 60 * K


def test_load_is_for_logging_only(device):
    moe = make("meta")
    moe.to_empty(device=device)
    assert moe.last_load.device.type == device.type
    assert set(moe.state_dict()) == {"router.gate.weight", "experts.w13", "experts.w2"}


def test_state_dict_with_everything(device):
    moe = make(device, shared=True, bias_update_speed=1e-3, score_func="sigmoid")
    assert set(moe.state_dict()) == {
        "router.gate.weight",
        "router.expert_bias",
        "experts.w13",
        "experts.w2",
        "shared_experts.w13.weight",
        "shared_experts.w2.weight",
        "shared_experts.gate.weight",
    }


@pytest.mark.parametrize("inner", [I, I + 16])
@pytest.mark.parametrize("config", [FP8Config(), FP8Config(save="fp8"), FP8Config.bf16()])
def test_shapes_on_the_meta_device(config, inner):
    with torch.device("meta"):
        moe = MoE(Router(H, E, K, balance_loss_coeff=0.1), Experts(E, H, inner, config=config))
    x = hidden("meta").requires_grad_()
    y, aux_loss = moe(x)
    (y.sum() + aux_loss).backward()
    assert y.is_meta and y.shape == x.shape == x.grad.shape
    assert all(p.grad.shape == p.shape for p in moe.parameters())


def gradients(moe, x, run):
    moe.zero_grad()
    y, aux_loss = run(moe, x)
    (y.float().square().mean() + aux_loss).backward()
    return [p.grad.clone() for p in moe.parameters()]


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


RUNS = {
    "plain": lambda moe, x: moe(x),
    "checkpoint": lambda moe, x: checkpoint(moe, x, use_reentrant=False),
    "reentrant checkpoint": lambda moe, x: checkpoint(moe, x, use_reentrant=True),
    "compiled": lambda moe, x: compiled(moe)(x),
    "compiled checkpoint": lambda moe, x: compiled(
        lambda x: checkpoint(moe, x, use_reentrant=False)
    )(x),
}


@pytest.mark.parametrize("config", [FP8Config(), FP8Config.bf16()], ids=["fp8", "bf16"])
@pytest.mark.parametrize("run", list(RUNS.values())[1:], ids=list(RUNS)[1:])
def test_aux_loss_keeps_its_gradient(device, run, config):
    moe, x = make(device, shared=True, config=config), hidden(device, torch.float32)
    x.requires_grad_()
    expected = gradients(moe, x, lambda moe, x: moe(x))
    assert all(torch.equal(a, b) for a, b in zip(gradients(moe, x, run), expected, strict=True))
    # Negative control: a loss without gradient would leave the router's another one.
    without = gradients(moe, x, lambda moe, x: (moe(x).y, moe(x).aux_loss.detach()))
    assert not torch.equal(without[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(without[1:], expected[1:], strict=True))


def test_autocast(device):
    moe, x = make(device, shared=True), hidden(device, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, aux_loss = moe(x)
    assert y.dtype == torch.bfloat16 and aux_loss.dtype == torch.float32
    (y.float().sum() + aux_loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_router_learns_through_the_routing_weights(device):
    moe = make(device, balance_loss_coeff=0.0, z_loss_coeff=0.0)
    moe(hidden(device)).y.float().square().sum().backward()
    assert moe.router.gate.weight.grad.any()


def test_bias_balancing_in_a_training_loop(device):
    moe = make(device, score_func="sigmoid", bias_update_speed=0.01, balance_loss_coeff=0.0)
    for _ in range(3):
        for _ in range(2):
            moe(hidden(device)).y.float().sum().backward()
        assert int(moe.router.accumulated_load.sum()) == 2 * 60 * K
        moe.router.update_bias()
    assert moe.router.expert_bias.any() and not moe.router.accumulated_load.any()


def test_no_tokens(device):
    moe = make(device, shared=True)
    y, aux_loss = moe(hidden(device, torch.float32)[:, :0].requires_grad_())
    assert y.shape == (2, 0, H)
    (y.sum() + aux_loss).backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


def test_parts_that_do_not_fit_are_refused(device):
    with pytest.raises(ValueError, match=r"experts: expected .* = \(4, 128\) .*, got \(4, 256\)"):
        MoE(Router(H, E, K), Experts(E, 2 * H, I))
    with pytest.raises(ValueError, match=r"experts: expected .* = \(4, 128\) .*, got \(2, 128\)"):
        MoE(Router(H, E, K), Experts(2, H, I))
