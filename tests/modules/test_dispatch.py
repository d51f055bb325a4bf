"""Dispatchers in one process: local, a group of one rank, sharding, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fp8moe import FP8Config, testing
from fp8moe.modules import (
    Experts,
    MoE,
    Router,
    clip_grad_norm_,
    expert_parameter_names,
    expert_parameters,
    freeze_experts,
    grad_norm,
    reduce_expert_gradients,
)
from fp8moe.modules.dispatch import AllToAllDispatcher, LocalDispatcher

E, K, H, I = 4, 2, 128, 128  # noqa: E741


@pytest.fixture
def group(device: torch.device) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone: gloo, or NCCL on the GPU. New tensors are on its device."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with device:
        yield dist.group.WORLD
    dist.destroy_process_group()


def inputs(tokens: int = 40):
    x = torch.randn(tokens, H).bfloat16().requires_grad_()
    ids, weights = testing.random_topk(tokens, K, E, 0, device=x.device)
    return x, ids, weights.requires_grad_()


def test_local_experts_have_nothing_to_dispatch():
    experts = Experts(E, H, I)
    assert isinstance(experts.dispatcher, LocalDispatcher) and experts.ep_mesh is None
    batch = inputs()
    assert experts.dispatch(*batch) is None
    assert torch.equal(experts(*batch, None), experts(*batch))
    assert list(experts.dispatcher.experts) == [0, 1, 2, 3]
    assert not list(expert_parameters(experts)) and not expert_parameter_names(experts)


@pytest.mark.parametrize("combine", ["rows", "sums"])
@pytest.mark.parametrize("config", [FP8Config(), FP8Config.bf16()], ids=["fp8", "bf16"])
@pytest.mark.parametrize("tokens", [40, 0])
def test_group_of_one_equals_local(group, config, combine, tokens):
    torch.manual_seed(1)
    local = Experts(E, H, I, config=config)
    torch.manual_seed(1)
    experts = Experts(E, H, I, config=config, ep_group=group, combine=combine)
    batch, twin = inputs(tokens), inputs(tokens)
    with torch.no_grad():
        for b, t in zip(batch, twin, strict=True):
            t.copy_(b)
    y, z = local(*batch), experts(*twin)
    assert torch.equal(z, y)
    dy = torch.randn(y.shape).bfloat16()
    y.backward(dy)
    z.backward(dy)
    pairs = [(twin[0], batch[0]), (twin[2], batch[2])]
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    for a, b in ((experts.w13, local.w13), (experts.w2, local.w2)):
        assert torch.equal(a.grad.full_tensor(), b.grad)


def test_moe_shards_its_experts(group):
    torch.manual_seed(1)
    local = MoE(Router(H, E, K), Experts(E, H, I))
    moe = copy.deepcopy(local)
    moe = MoE(moe.router, moe.experts, ep_group=group)
    assert "ep=1" in repr(moe.experts)
    assert expert_parameter_names(moe) == ["experts.w13", "experts.w2"]
    assert isinstance(moe.experts.dispatcher, AllToAllDispatcher)
    x = torch.randn(2, 20, H).bfloat16()
    assert torch.equal(moe(x).y, local(x).y)
    assert torch.equal(copy.deepcopy(moe)(x).y, local(x).y)
    with pytest.raises(RuntimeError, match="shard: expected experts without ep_group"):
        MoE(moe.router, moe.experts, ep_group=group)


def test_sharding_keeps_frozen_weights_frozen(group):
    experts = Experts(E, H, I).requires_grad_(False).shard(group)
    assert not any(p.requires_grad for p in experts.parameters())


def test_spread_experts_are_not_frozen_or_exported(group):
    model = torch.nn.Sequential(MoE(Router(H, E, K), Experts(E, H, I), ep_group=group))
    with pytest.raises(ValueError, match="0.experts: Experts: expected all experts in one process"):
        freeze_experts(model)
    assert isinstance(model[0].experts, Experts)


def test_initialisation_does_not_depend_on_the_group(group):
    torch.manual_seed(3)
    whole = Experts(E, H, I)
    torch.manual_seed(3)
    sharded = Experts(E, H, I, ep_group=group)
    assert torch.equal(sharded.w2.full_tensor(), whole.w2)


def test_tokens_on_their_way_serve_one_forward(group):
    experts = Experts(E, H, I, ep_group=group)
    batch = inputs()
    tokens = experts.dispatch(*batch)
    experts(*batch, tokens)
    with pytest.raises(RuntimeError, match="dispatched: expected tokens on their way, got some"):
        experts(*batch, tokens)
    experts.dispatch(*batch)  # never used
    assert experts(*batch).isfinite().all()


def test_meta_device_then_materialised(group, device):
    experts = Experts(E, H, I, device="meta", ep_group=group).to_empty(device=device)
    experts.reset_parameters()
    assert experts.ep_mesh.device_type == device.type
    assert experts(*inputs()).isfinite().all()


class Elsewhere:
    """A dispatcher that holds the second half of the experts: only its range is used."""

    experts = range(E // 2, E)


def test_initialisation_draws_all_experts_and_keeps_its_own():
    torch.manual_seed(3)
    whole = Experts(E, H, I)
    torch.manual_seed(3)
    half = Experts(E, H, I)
    half.w13, half.w2 = (torch.nn.Parameter(w[: E // 2].clone()) for w in (half.w13, half.w2))
    half.dispatcher = Elsewhere()
    torch.manual_seed(3)
    half.reset_parameters()
    assert torch.equal(half.w13, whole.w13[E // 2 :]) and torch.equal(half.w2, whole.w2[E // 2 :])


def test_weight_cache_belongs_to_the_sharded_parameter(group):
    from fp8moe.functional import clear_weight_cache, weight_cache_info

    experts = Experts(E, H, I, ep_group=group)
    optimizer = torch.optim.SGD(experts.parameters(), lr=1.0)
    clear_weight_cache()
    before = weight_cache_info()
    first = experts(*inputs())
    second = experts(*inputs())
    after = weight_cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 2)
    (first + second).float().square().mean().backward()
    # Without gradients the same copies serve, and any optimizer's step makes them stale too.
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for act, hits in ((lambda: None, 2), (other.step, 0)):
        act()
        before = weight_cache_info().hits
        with torch.no_grad():
            experts(*inputs())
        assert weight_cache_info().hits - before == hits

    # A step, and writes that only one of the two version counters shows, are all seen.
    def step():
        optimizer.step()

    def write_whole():
        with torch.no_grad():
            experts.w2.mul_(2)

    def write_part():
        experts.w2.to_local().detach().mul_(2)

    for change in (step, write_whole, write_part):
        torch.manual_seed(0)
        old = experts(*inputs())
        change()
        torch.manual_seed(0)
        new = experts(*inputs())
        clear_weight_cache()
        torch.manual_seed(0)
        assert torch.equal(new, experts(*inputs())), change.__name__
        assert not torch.equal(new, old), change.__name__


def test_using_weights_without_gradients_leaves_no_mark_on_them(group):
    experts = Experts(E, H, I, ep_group=group)
    with torch.no_grad():
        experts(*inputs())
    assert not hasattr(experts.w13._local_tensor, "part_of")


def test_main_grad_of_a_sharded_parameter(group):
    experts = Experts(E, H, I, ep_group=group)
    torch.manual_seed(0)
    experts(*inputs()).float().square().mean().backward()
    expected = [p.grad.full_tensor().clone() for p in experts.parameters()]
    for p in experts.parameters():
        p.grad = None
        p.main_grad = torch.zeros(p.to_local().shape)
    torch.manual_seed(0)
    experts(*inputs()).float().square().mean().backward()
    for p, grad in zip(experts.parameters(), expected, strict=True):
        # torch 2.11 makes zeros of the gradient that is not there, on the way to the DTensor.
        zeros = torch.__version__ < (2, 13) and p.grad is not None
        assert not p.grad.to_local().any() if zeros else p.grad is None
        assert p.grad_added_to_main_grad
        assert torch.equal(p.main_grad, grad)
    reduce_expert_gradients(experts)
    assert torch.equal(experts.w2.main_grad, expected[1])
    experts.w2.main_grad = torch.zeros(1)
    with pytest.raises(ValueError, match=r"w2.main_grad: expected shape \(4, 128, 128\)"):
        experts(*inputs())


def test_gradient_norm_over_plain_and_sharded_parameters(group):
    torch.manual_seed(1)
    moe = MoE(Router(H, E, K), Experts(E, H, I), ep_group=group)
    assert grad_norm(moe.parameters()) == 0
    moe(torch.randn(30, H).bfloat16()).y.float().square().sum().backward()
    grads = [p.grad.full_tensor() if p.ndim == 3 else p.grad for p in moe.parameters()]
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
    torch.testing.assert_close(grad_norm(moe.parameters()), expected)
    torch.testing.assert_close(clip_grad_norm_(moe.parameters(), 0.1), expected)
    torch.testing.assert_close(grad_norm(moe.parameters()), torch.tensor(0.1), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="max_norm: expected more than 0, got -1"):
        clip_grad_norm_(moe.parameters(), -1)


def test_a_norm_without_the_gradients_in_main_grad_is_refused(device):
    moe, x = MoE(Router(H, E, K), Experts(E, H, I)).to(device), torch.randn(30, H, device=device)
    moe(x).y.float().square().sum().backward()
    expected = grad_norm(moe.parameters())
    moe.zero_grad()
    weights = list(moe.experts.parameters())
    for p in weights:
        p.main_grad = torch.zeros_like(p)
    moe(x).y.float().square().sum().backward()
    message = r"parameters: expected gradients in grad, got .* \(4, 256, 128\) .* in main_grad"
    with pytest.raises(ValueError, match=message):
        clip_grad_norm_(moe.parameters(), 1.0)
    for p in weights:
        p.grad = p.main_grad
    torch.testing.assert_close(grad_norm(moe.parameters()), expected)


def test_refused_before_any_work(group, device):
    mesh = init_device_mesh(device.type, (1, 1), mesh_dim_names=("dp", "ep"))
    elsewhere = DeviceMesh("cpu" if device.type == "cuda" else "cuda", [0], _init_backend=False)
    for bad, message in (
        ({"ep_group": mesh}, r"ep_group: expected a mesh of one dimension, got 2.*mesh\['ep'\]"),
        ({"ep_group": elsewhere}, f"ep_group: expected a mesh of {device.type} devices, got"),
        ({"ep_group": 3}, "ep_group: expected a ProcessGroup with this rank in it.* got 3"),
        ({"ep_group": group, "combine": "mean"}, "combine: expected 'rows' or 'sums', got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            Experts(E, H, I, **bad)
    assert Experts(E, H, I, ep_group=mesh["ep"]).ep_mesh.size() == 1
    experts = Experts(E, H, I, ep_group=group)
    x, ids, weights = inputs()
    for args, message in (
        ((x, ids + E, weights), r"topk_ids: expected ids 0 to 4, got others on ranks \[0\]"),
        ((x, ids, weights[:, :1]), "topk_weights: expected shape"),
        ((x[:, :64], ids, weights), r"x_TH: expected \(T, 128\), got \(40, 64\)"),
        ((x.double(), ids, weights), "x: expected torch.bfloat16 or"),
    ):
        with pytest.raises(ValueError, match=message):
            experts(*args)


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match="ep_group: expected torch.distributed to be initialised"):
        Experts(E, H, I, ep_group=object())
