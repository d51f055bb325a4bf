"""Experts spread over 2 and 4 processes against the same experts in one.

The processes of one group size start once and go through all checks. On the CPU over gloo, and over
NCCL where there are as many GPUs.

    python tests/modules/test_dispatch_dist.py RANK SIZE FOLDER DEVICE     # one of the processes
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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

from fp8moe import FP8Config, swiglu_experts, testing
from fp8moe.functional.exchange import Exchange
from fp8moe.functional.expert_parallel import dispatch, expert_parallel_swiglu
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

E, K, H, I = 8, 3, 128, 128  # noqa: E741
TIMEOUT_S = 100

CONFIGS = {
    "fp8": FP8Config(),
    "fp8, h in fp8": FP8Config(save="fp8"),
    "fp8, h recomputed": FP8Config(save="recompute"),
    "bf16": FP8Config.bf16(),
    "bf16, h recomputed": FP8Config.bf16(save="recompute"),
    "dgrad in bf16": FP8Config(dgrad="bf16"),
}


class Ranks:
    """This process and the others."""

    def __init__(self, rank: int, size: int, device: str, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.device = torch.device(device, rank) if device == "cuda" else torch.device(device)
        self.group = dist.group.WORLD
        self.experts = slice(rank * E // size, (rank + 1) * E // size)

    def tokens(self, total: int) -> slice:
        """This rank's part of a batch: uneven, and none on rank 1."""
        shares = torch.tensor([3, 0, 5, 1, 2, 2, 7, 1][: self.size])
        ends = (shares.cumsum(0) * total // shares.sum()).tolist()
        return slice(([0, *ends])[self.rank], ends[self.rank])

    def even(self, total: int) -> slice:
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)


CHECKS: dict[str, Callable[[Ranks], None]] = {}


def check(fn: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
    CHECKS[fn.__name__] = fn
    return fn


# ---- the layer ---------------------------------------------------------------------------------


def batch(kind: str, device: torch.device, tokens: int = 132) -> tuple[torch.Tensor, ...]:
    """x, ids, weights, w13, w2, dy of all ranks, the same on each."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ids, weights = testing.random_topk(tokens, K, E, 0, dropped=0.1)
    if kind == "a rank without work":
        ids = torch.where(ids < E // 2, ids + E // 2, ids)
    elif kind == "all on one rank":
        ids = torch.where(ids == E, ids, ids % 2)
    elif kind == "one expert":
        ids = torch.full_like(ids, E - 1)
    elif kind == "all dropped":
        ids = torch.full_like(ids, E)
    x, dy = normal(tokens, H).bfloat16(), normal(tokens, H).bfloat16()
    w13, w2 = normal(E, 2 * I, H) * 0.1, normal(E, H, I) * 0.1
    return tuple(t.to(device) for t in (x, ids, weights, w13, w2, dy))


KINDS = ("uniform", "a rank without work", "all on one rank", "one expert", "all dropped")


def both(
    ranks: Ranks, config: FP8Config, kind: str = "uniform", combine: Any = "rows"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """y and the gradients: of this rank, and the same part of one process' results."""
    x, ids, weights, w13, w2, dy = batch(kind, ranks.device)
    at = ranks.tokens(len(x))

    def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.clone().requires_grad_() for t in tensors]

    whole = leaves(x, weights, w13, w2)
    y = swiglu_experts(whole[0], ids, *whole[1:], config=config)
    y.backward(dy)
    mine = leaves(x[at], weights[at], w13[ranks.experts], w2[ranks.experts])
    tokens = dispatch(
        mine[0], ids[at], mine[1], E, I, config=config, group=ranks.group, combine=combine
    )
    z = expert_parallel_swiglu(tokens, *mine)
    z.backward(dy[at])
    parts = at, at, ranks.experts, ranks.experts
    names = "dx", "dp", "dw13", "dw2"
    got = {"y": z.detach(), **dict(zip(names, (t.grad for t in mine), strict=True))}
    expected = {n: w.grad[part] for n, w, part in zip(names, whole, parts, strict=True)}
    return got, {"y": y.detach()[at], **expected}


def differing(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, t in got.items() if not torch.equal(t, expected[name])}


def any_rank(ranks: Ranks, value: bool) -> bool:
    flag = torch.tensor(float(value), device=ranks.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


@check
def same_bits_as_one_process(ranks: Ranks) -> None:
    for name, config in CONFIGS.items():
        for kind in KINDS:
            got, expected = both(ranks, config, kind)
            assert differing(got, expected) == set(), (name, kind, differing(got, expected))


@check
def sums_differ_by_one_rounding(ranks: Ranks) -> None:
    for config in (FP8Config(), FP8Config.bf16()):
        got, expected = both(ranks, config, combine="sums")
        assert differing(got, expected) <= {"y", "dx"}
        assert any_rank(ranks, "y" in differing(got, expected))
        for name in ("y", "dx"):
            if len(got[name]):
                assert testing.sqnr_db(got[name], expected[name]) > 45, name


@check
def planted_errors_are_found(ranks: Ranks) -> None:
    """Negative control of the two checks above: each fault shows in y or a gradient."""
    config = FP8Config()

    def with_fault(name: str, fault: Callable[..., Any]) -> set[str]:
        original = getattr(Exchange, name)
        setattr(Exchange, name, lambda self, *args: fault(original, self, *args))
        try:
            got, expected = both(ranks, config)
        finally:
            setattr(Exchange, name, original)
        return {n for n in got if any_rank(ranks, n in differing(got, expected))}

    def doubled_scale(send: Any, self: Exchange, scale: torch.Tensor, *more: torch.Tensor) -> Any:
        return send(self, scale * 2, *more)

    def reversed_order(send: Any, self: Exchange, rows: torch.Tensor) -> Any:
        return send(self, rows.flip(0))

    def slots_of_the_next_token(send: Any, self: Exchange, values: torch.Tensor) -> Any:
        return send(self, values.roll(1, 0))

    assert with_fault("send_side", doubled_scale) >= {"y", "dw13", "dw2"}
    assert with_fault("send_rows", reversed_order) >= {"y", "dx", "dp", "dw13", "dw2"}
    assert with_fault("return_rows", reversed_order) == {"y", "dx"}
    assert with_fault("return_slots", slots_of_the_next_token) == {"dp"}


@check
def a_token_travels_once_per_rank(ranks: Ranks) -> None:
    x, ids, weights, *_ = batch("uniform", ranks.device)
    at = ranks.tokens(len(x))
    tokens = dispatch(x[at], ids[at], weights[at], E, I, config=FP8Config(), group=ranks.group)
    on_rank = (ids[at].unsqueeze(-1) // (E // ranks.size) == torch.arange(ranks.size).to(ids)).cpu()
    assert tokens.exchange.rows.to == on_rank.any(dim=1).sum(dim=0).tolist()
    assert tokens.exchange.slots.to == on_rank.sum(dim=(0, 1)).tolist()
    tokens.wait()


@check
def wrong_arguments_are_raised_on_every_rank(ranks: Ranks) -> None:
    x, ids, weights, *_ = batch("uniform", ranks.device, tokens=8)
    wrong = ids + E if ranks.rank == 1 else ids
    fewer = slice(0, K - 1 if ranks.rank == 1 else K)
    for args, message in (
        ((x, wrong, weights), f"topk_ids: expected ids 0 to {E}, got others on ranks [1]"),
        ((x, ids[:, fewer], weights[:, fewer]), "topk_ids: expected one K on all ranks"),
    ):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            dispatch(*args, E, I, config=FP8Config(), group=ranks.group)
    with pytest.raises(ValueError, match=f"num_experts: expected a multiple of the {ranks.size}"):
        Experts(E + 1, H, I, ep_group=ranks.group, device=ranks.device)
    pair = dist.new_group([0])
    if ranks.rank:
        with pytest.raises(ValueError, match="ep_group: expected a ProcessGroup with this rank"):
            Experts(E, H, I, ep_group=pair, device=ranks.device)


# ---- models ------------------------------------------------------------------------------------


class Model(nn.Module):
    """y = out(x + moe(x)), with a shared expert."""

    def __init__(self, device: torch.device, ep_group: Any = None, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(11)
        experts = FP8Config(**config)
        with device:
            self.moe = MoE(
                Router(H, E, K),
                Experts(E, H, I, config=experts, ep_group=ep_group),
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
    """Plain and sharded parameters, and those of different meshes, in groups of their own."""
    own = {id(p) for p in expert_parameters(model)}
    groups = [[p for p in model.parameters() if (id(p) in own) == mine] for mine in (False, True)]
    return torch.optim.AdamW([{"params": g} for g in groups if g], lr=1e-3, foreach=True)


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
    expected = train(Model(ranks.device), None)
    model = ddp(Model(ranks.device, ranks.group))
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model))
    assert_same_training(got, expected)
    # Negative control: sums in place of means.
    with pytest.raises(AssertionError):
        assert_same_training(train(ddp(Model(ranks.device, ranks.group)), ranks), expected)


@check
def fsdp_trains_like_one_process(ranks: Ranks) -> None:
    expected = train(Model(ranks.device), None)
    model = Model(ranks.device, ranks.group)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model)))
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model))
    assert_same_training(got, expected)


def replicated(ranks: Ranks) -> DeviceMesh:
    """Two ranks share the experts; each has size / 2 replicas."""
    shape = ranks.size // 2, 2
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("dp", "ep"))


@check
def replicated_experts_under_ddp(ranks: Ranks) -> None:
    mesh = replicated(ranks)
    model = ddp(Model(ranks.device, mesh["ep"]))
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model, mesh["dp"].get_group()))
    assert_same_training(got, train(Model(ranks.device), None))


@check
def replicated_experts_under_fsdp(ranks: Ranks) -> None:
    mesh = replicated(ranks)
    model = Model(ranks.device, mesh["ep"], cache_weights=False)
    own = set(expert_parameters(model))
    fully_shard(model.moe.experts, mesh=mesh["dp"])
    fully_shard(model, mesh=init_device_mesh(ranks.device.type, (ranks.size,)), ignored_params=own)
    got = train(model, ranks, reduce=lambda: reduce_expert_gradients(model))
    assert_same_training(got, train(Model(ranks.device), None))


@check
def checkpointed_compiled_and_autocast(ranks: Ranks) -> None:
    x, target = data(ranks.device, 0)
    at = ranks.even(len(x))

    def gradients(run: Callable[[Model, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        model = Model(ranks.device, ranks.group)
        (run(model, x[at]) - target[at]).square().sum().backward()
        return [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]

    def checkpointed(model: Model, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    def compiled(model: Model, x: torch.Tensor) -> torch.Tensor:
        return torch.compile(model, backend="aot_eager")(x)

    expected = gradients(lambda model, x: model(x))
    for run in (checkpointed, compiled):
        for got, wanted in zip(gradients(run), expected, strict=True):
            assert testing.sqnr_db(got, wanted) > 60, run.__name__
    with torch.autocast(ranks.device.type, dtype=torch.bfloat16):
        y = Model(ranks.device, ranks.group).moe(x[at]).y
    assert y.dtype == torch.bfloat16


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


def assert_resumes(folder: Path, device: torch.device, ep_group: Any, **kwargs: Any) -> None:
    """What was saved, with another number of ranks, continues as if there had been no break."""
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
    set_state_dict(
        model,
        resumed,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=FLAT,
    )
    for name, w in full_parameters(model).items():
        torch.testing.assert_close(w, expected.get_parameter(name), msg=name)
    trained(expected, optimizer, device)
    trained(model, resumed, device)
    for name, w in full_parameters(model).items():
        torch.testing.assert_close(w, expected.get_parameter(name), rtol=1e-4, atol=2e-5, msg=name)


@check
def resumes_what_one_process_saved(ranks: Ranks) -> None:
    assert_resumes(ranks.folder / "saved-1", ranks.device, ranks.group)


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


# ---- one process of a group --------------------------------------------------------------------


def run_checks(rank: int, size: int, folder: Path, device: str) -> None:
    """All checks in order; their outcomes go to FOLDER/SIZE-RANK.json.

    The first failure ends the process, and through the broken connections the others: after it the
    ranks would no longer be at the same place.
    """
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    limit = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    ranks = Ranks(rank, size, device, folder)
    outcome: dict[str, str] = {}
    path = folder / f"outcome-{size}-{rank}.json"
    for name, fn in CHECKS.items():
        try:
            fn(ranks)
            dist.barrier()
            outcome[name] = "passed"
        except BaseException:
            outcome[name] = traceback.format_exc()
        path.write_text(json.dumps(outcome))
        if outcome[name] != "passed":
            os._exit(1)
    dist.destroy_process_group()


# ---- tests -------------------------------------------------------------------------------------


def launch(size: int, folder: Path, device: str) -> list[dict[str, str]]:
    """The outcomes of all checks, {check: "passed" or a traceback}, on each of `size` ranks."""
    root = Path(__file__).resolve().parents[2]
    # NVLink multicast is of no use here, and not every host offers it.
    settings = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(size), str(folder), device],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=2 * TIMEOUT_S)[0])
    except subprocess.TimeoutExpired:
        texts.append(f"no end after {2 * TIMEOUT_S} s")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    paths = [folder / f"outcome-{size}-{rank}.json" for rank in range(size)]
    outcomes = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    if not all(outcomes):
        raise RuntimeError("a process did not start:\n" + "\n".join(texts)[-4000:])
    return outcomes


def sizes_for(device: str) -> list[int]:
    if device == "cpu":
        return [2, 4]
    return [n for n in (2, 4, 8) if n <= torch.cuda.device_count()]


# One test for all checks: they share processes, and test workers would each start their own.
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_checks(device: torch.device, tmp_path: Path) -> None:
    sizes = sizes_for(device.type)
    if not sizes:
        pytest.skip("needs at least two GPUs")
    save(tmp_path / "saved-1", device, None, no_dist=True)
    for size in sizes:
        outcomes = launch(size, tmp_path, device.type)
        failures = [
            f"{name}, rank {rank} of {size}:\n{text}"
            for rank, outcome in enumerate(outcomes)
            for name, text in outcome.items()
            if text != "passed"
        ]
        assert not failures, "\n".join(failures)
        assert all(outcome.keys() == CHECKS.keys() for outcome in outcomes)
        # One process resumes what many saved.
        assert_resumes(tmp_path / f"saved-{size}", device, None, no_dist=True)


if __name__ == "__main__":
    run_checks(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
