"""Checks of models with expert-parallel layers: training under DDP and FSDP2, checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dispatch_ranks import E, H, I, K, Ranks, check
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fp8moe import FP8Config, testing
from fp8moe.modules import (
    Experts,
    MoE,
    Router,
    SharedExperts,
    clip_grad_norm_,
    expert_parameter_names,
    expert_parameters,
    reduce_expert_gradients,
)


class Model(nn.Module):
    """y = out(x + moe(x)), with a shared expert."""

    def __init__(
        self, device: torch.device, ep_group: Any = None, combine: Any = "rows", **config: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(11)
        experts = FP8Config(**config)
        with device:
            self.moe = MoE(
                Router(H, E, K),
                Experts(E, H, I, config=experts, ep_group=ep_group, combine=combine),
                SharedExperts(H, 64),
            )
            self.out = nn.Linear(H, 8)
            self.moe.experts.reset_parameters(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x + self.moe(x).y)


def data(device: torch.device, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn(96, H, generator=generator), torch.randn(96, 8, generator=generator)
    return x.to(device), target.to(device)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Plain and sharded parameters, and those of different meshes, in groups of their own.

    With its default eps AdamW's first step is the sign of the gradient: other roundings of an
    element near zero would move it by twice the learning rate.
    """
    own = {id(p) for p in expert_parameters(model)}
    groups = [[p for p in model.parameters() if (id(p) in own) == mine] for mine in (False, True)]
    return torch.optim.AdamW([{"params": g} for g in groups if g], lr=1e-3, eps=1e-3, foreach=True)


def train(
    model: nn.Module, ranks: Ranks | None, steps: int = 3, reduce: Callable[[], None] = lambda: None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """SGD with clipping on the mean loss of the whole batch: norms, and the final parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, foreach=False)
    device = next(model.parameters()).device
    norms = []
    for step in range(steps):
        x, target = data(device, step)
        at = slice(None) if ranks is None else ranks.even(len(x))
        (model(x[at]) - target[at]).square().mean().backward()
        reduce()
        norms.append(float(clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, full_parameters(model)


@functools.cache
def trained_by_one_process(device: torch.device) -> tuple[list[float], dict[str, torch.Tensor]]:
    return train(Model(device), None)


def full_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    full = {}
    for name, p in model.named_parameters():
        p = p.detach()
        full[name.removeprefix("module.")] = p.full_tensor() if hasattr(p, "full_tensor") else p
    return full


def assert_same_training(got: Any, expected: Any) -> None:
    """The order of sums over ranks differs, so routers and linear layers differ by roundings."""
    assert got[0] == pytest.approx(expected[0], rel=2e-3)
    start = full_parameters(Model(next(iter(got[1].values())).device))
    assert got[1].keys() == expected[1].keys() == start.keys()
    for name, w in expected[1].items():
        moved, wanted = got[1][name] - start[name], w - start[name]
        assert testing.sqnr_db(moved, wanted) > 30, (name, testing.sqnr_db(moved, wanted))


@check
def router_and_shared_expert_gradients(ranks: Ranks) -> None:
    single, model = Model(ranks.device), Model(ranks.device, ranks.group)
    x, target = data(ranks.device, 0)
    at = ranks.even(len(x))
    y, z = single(x), model(x[at])
    assert testing.sqnr_db(z.detach(), y.detach()[at]) > 60
    (y - target).square().sum().backward()
    (z - target[at]).square().sum().backward()
    for name in ("moe.router.gate.weight", "moe.shared_experts.w13.weight", "out.weight"):
        grad = model.get_parameter(name).grad
        alone = grad.clone()
        dist.all_reduce(grad)
        expected = single.get_parameter(name).grad
        assert expected.any() and testing.sqnr_db(grad, expected) > 50, name
        assert testing.sqnr_db(alone, expected) < 20, name  # one rank's part is not the whole


def ddp(model: Model) -> DistributedDataParallel:
    ignored = expert_parameter_names(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model)


@check
def ddp_trains_like_one_process(ranks: Ranks) -> None:
    expected = trained_by_one_process(ranks.device)
    model = ddp(Model(ranks.device, ranks.group))
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model))
    assert_same_training(got, expected)
    # Negative control: sums in place of means.
    with pytest.raises(AssertionError):
        assert_same_training(train(ddp(Model(ranks.device, ranks.group)), ranks), expected)


@check
def fsdp_trains_like_one_process(ranks: Ranks) -> None:
    expected = trained_by_one_process(ranks.device)
    model = Model(ranks.device, ranks.group, "sums")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model)))
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model))
    assert_same_training(got, expected)


@functools.cache
def replicated(ranks: Ranks) -> DeviceMesh:
    """Two ranks share the experts; each has size / 2 replicas. Made once: each call would make two
    communicators, which takes NCCL seconds."""
    shape = ranks.size // 2, 2
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("dp", "ep"))


@check
def replicated_experts_under_ddp(ranks: Ranks) -> None:
    mesh = replicated(ranks)
    model = ddp(Model(ranks.device, mesh["ep"]))
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model, mesh["dp"].get_group()))
    assert_same_training(got, trained_by_one_process(ranks.device))


@check
def replicated_experts_under_fsdp(ranks: Ranks) -> None:
    mesh = replicated(ranks)
    model = Model(ranks.device, mesh["ep"], "sums", cache_weights=False)
    own = set(expert_parameters(model))
    fully_shard(model.moe.experts, mesh=mesh["dp"])
    fully_shard(model, mesh=init_device_mesh(ranks.device.type, (ranks.size,)), ignored_params=own)
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model))
    assert_same_training(got, trained_by_one_process(ranks.device))


@check
def autocast(ranks: Ranks) -> None:
    with torch.autocast(ranks.device.type, dtype=torch.bfloat16):
        y = Model(ranks.device, ranks.group).moe(data(ranks.device, 0)[0][:5]).y
    assert y.dtype == torch.bfloat16


@check
def load_of_several_micro_batches_under_ddp(ranks: Ranks) -> None:
    """DDP broadcasts rank 0's buffers before each forward; every rank's own load must survive."""
    model = Model(ranks.device, ranks.group)
    with ranks.device:
        model.moe.router = Router(H, E, K, bias_update_speed=0.1)
    replica, load = ddp(model), torch.zeros(E, device=ranks.device)
    for step in range(3):
        x, target = data(ranks.device, step)
        at = ranks.even(len(x))
        (replica(x[at]) - target[at]).square().mean().backward()
        load += model.moe.last_load
    dist.all_reduce(load)
    model.moe.router.update_bias(ranks.group)
    assert load.sum() == 3 * 96 * K
    assert torch.equal(model.moe.router.expert_bias, 0.1 * (load.mean() - load).sign())


@check
def wrong_replicas_are_refused(ranks: Ranks) -> None:
    model = Model(ranks.device, ranks.group)
    with pytest.raises(ValueError, match="replicas: expected ranks that hold the same experts"):
        reduce_expert_gradients(model, ranks.group)


# ---- checkpoints -------------------------------------------------------------------------------


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """One step on the same data everywhere: every rank makes the step of one process."""
    x, target = data(device, 5)
    (model(x) - target).square().mean().backward()
    reduce_expert_gradients(model)
    optimizer.step()
    optimizer.zero_grad()


# By parameter name, not by parameter group: one process has no group for sharded parameters.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    return {"model": weights, "optimizer": moments}


def save(folder: Path, device: torch.device, ep_group: Any, **kwargs: Any) -> None:
    model = Model(device, ep_group)
    optimizer = optimizer_of(model)
    trained(model, optimizer, device)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder, **kwargs)


def assert_resumes(
    folder: Path, device: torch.device, ep_group: Any, lose: str = "", **kwargs: Any
) -> None:
    """What was saved, with another number of ranks, continues as if there had been no break.

    lose: part of the names of optimizer states that are lost on the way, for the negative control.
    """
    expected = Model(device)
    optimizer = optimizer_of(expected)
    trained(expected, optimizer, device)
    model = Model(device, ep_group)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    resumed = optimizer_of(model)
    state = state_of(model, resumed)
    dcp.load(state, checkpoint_id=folder, **kwargs)
    if lose:
        for name, value in state["optimizer"].items():
            if lose in name:
                value.zero_()
    set_state_dict(
        model,
        resumed,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=FLAT,
    )
    for name, w in full_parameters(model).items():
        torch.testing.assert_close(w, expected.get_parameter(name), rtol=1e-4, atol=1e-5, msg=name)
    trained(expected, optimizer, device)
    trained(model, resumed, device)
    for name, w in full_parameters(model).items():
        torch.testing.assert_close(w, expected.get_parameter(name), rtol=1e-4, atol=2e-5, msg=name)


@check
def resumes_what_one_process_saved(ranks: Ranks) -> None:
    assert_resumes(ranks.folder / "saved-1", ranks.device, ranks.group)
    with pytest.raises(AssertionError, match="moe.experts"):
        assert_resumes(ranks.folder / "saved-1", ranks.device, ranks.group, lose="w13.exp_avg")


@check
def saves_for_other_sizes(ranks: Ranks) -> None:
    save(ranks.folder / f"saved-{ranks.size}", ranks.device, ranks.group)
    assert_resumes(ranks.folder / f"saved-{ranks.size}", ranks.device, ranks.group)
    if ranks.size > 2:
        mesh = replicated(ranks)["ep"]
        assert_resumes(ranks.folder / "saved-2", ranks.device, ranks.group)
        assert_resumes(ranks.folder / f"saved-{ranks.size}", ranks.device, mesh)
        save(ranks.folder / "saved-replicated", ranks.device, mesh)
        assert_resumes(ranks.folder / "saved-replicated", ranks.device, ranks.group)
    assert_resumes(ranks.folder / f"saved-{ranks.size}", ranks.device, None)


@check
def unsharded_state_dicts(ranks: Ranks) -> None:
    """The whole state of one process loads into sharded experts; a wrong one does not."""
    single, model = Model(ranks.device), Model(ranks.device, ranks.group)
    with torch.no_grad():
        for p in single.parameters():
            p.add_(1)
    full = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, single.state_dict(), options=full)
    for name, w in full_parameters(model).items():
        assert torch.equal(w, single.get_parameter(name)), name
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in single.state_dict().items()
    }
    more = {"model": {"moe.experts.w13": torch.zeros(2 * E, 2 * I, H, device=ranks.device)}}
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch between saved"):
        dcp.load(more, checkpoint_id=ranks.folder / f"saved-{ranks.size}")


@check
def compiled(ranks: Ranks) -> None:
    if ranks.size > 2:  # compiling takes as long as all other checks together
        return
    x, target = data(ranks.device, 0)
    at = ranks.even(len(x))

    def gradients(run: Callable[[Model, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        model = Model(ranks.device, ranks.group)
        (run(model, x[at]) - target[at]).square().sum().backward()
        return [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]

    expected = gradients(lambda model, x: model(x))
    got = gradients(lambda model, x: torch.compile(model, backend="aot_eager")(x))
    for mine, wanted in zip(got, expected, strict=True):
        assert testing.sqnr_db(mine, wanted) > 60
