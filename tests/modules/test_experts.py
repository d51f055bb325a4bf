"""Experts: parameters, initialisation, state dict, and that forward is swiglu_experts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.functional import swiglu_experts, weight_cache_info
from fp8moe.modules import Experts

T, K, E, H, I = 40, 2, 4, 128, 256  # noqa: E741


def inputs(device):
    ids, weights = testing.random_topk(T, K, E, 0, device=device)
    return torch.randn(T, H, device=device).bfloat16(), ids, weights


@pytest.mark.parametrize("config", [None, FP8Config.bf16()])
def test_forward_is_swiglu_experts(device, config):
    experts = Experts(E, H, I, config=config, device=device)
    x, ids, weights = inputs(device)
    expected = swiglu_experts(
        x, ids, weights, experts.w13, experts.w2, config=config or FP8Config()
    )
    assert torch.equal(experts(x, ids, weights), expected)


def test_parameters_and_state_dict(device):
    experts = Experts(E, H, I, device=device, dtype=torch.bfloat16)
    shapes = {name: tuple(t.shape) for name, t in experts.state_dict().items()}
    assert shapes == {"w13": (E, 2 * I, H), "w2": (E, H, I)}
    assert {p.dtype for p in experts.parameters()} == {torch.bfloat16}
    other = Experts(E, H, I, device=device, dtype=torch.bfloat16)
    other.load_state_dict(experts.state_dict())
    x, ids, weights = inputs(device)
    assert torch.equal(experts(x, ids, weights), other(x, ids, weights))


def test_initialisation(device):
    experts = Experts(E, H, I, device=device)
    assert experts.w13.std().item() == pytest.approx(0.02, rel=0.05)
    assert experts.w13.abs().max() <= 0.06 + 1e-6
    experts.reset_parameters(std=0.1, out_std=0.01)
    assert experts.w13.std().item() == pytest.approx(0.1, rel=0.05)
    assert experts.w2.std().item() == pytest.approx(0.01, rel=0.05)
    torch.manual_seed(5)
    a = Experts(E, H, I, device=device)
    torch.manual_seed(5)
    assert torch.equal(a.w2, Experts(E, H, I, device=device).w2)


def test_meta_device_then_materialised(device):
    experts = Experts(E, H, I, device="meta").to_empty(device=device)
    experts.reset_parameters()
    x, ids, weights = inputs(device)
    assert experts(x, ids, weights).isfinite().all()


def test_config_can_be_replaced(device):
    experts = Experts(E, H, I, device=device)
    x, ids, weights = inputs(device)
    with torch.no_grad():
        fp8 = experts(x, ids, weights)
        experts.config = FP8Config.bf16()
        bf16 = experts(x, ids, weights)
    assert not torch.equal(fp8, bf16) and testing.sqnr_db(fp8, bf16) > 22
    assert "fprop=bf16" in repr(experts)


def test_copies_and_pickles_without_the_cache(device):
    experts = Experts(E, H, I, device=device)
    x, ids, weights = inputs(device)
    expected = experts(x, ids, weights)
    entries = weight_cache_info().entries
    twins = (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)))
    assert weight_cache_info().entries == entries
    for twin in twins:
        assert torch.equal(twin(x, ids, weights), expected)


def test_trains(device):
    experts = Experts(E, H, I, device=device)
    x, ids, weights = inputs(device)
    target = torch.randn(T, H, device=device)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = (experts(x, ids, weights).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        ((0, H, I), None, "num_experts: expected at least 1, got 0"),
        ((E, 100, I), None, "hidden_size, in FP8: expected a multiple of 16, got 100"),
        ((E, H, 12), FP8Config.bf16(), "intermediate_size: expected a multiple of 8, got 12"),
        ((E, H, I), "fp8", "config: expected an FP8Config, got 'fp8'"),
    ],
)
def test_bad_options_are_named(sizes, config, message):
    with pytest.raises(ValueError, match=message):
        Experts(*sizes, config=config)
