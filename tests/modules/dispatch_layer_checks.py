"""Checks of one expert-parallel layer against the same layer in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dispatch_ranks import E, H, I, K, Ranks, any_rank, check

from fp8moe import FP8Config, swiglu_experts, testing
from fp8moe.functional.exchange import Exchange
from fp8moe.functional.expert_parallel import dispatch, expert_parallel_swiglu
from fp8moe.modules import Experts

CONFIGS = {
    "fp8": FP8Config(),
    "fp8, h in fp8": FP8Config(save="fp8"),
    "fp8, h recomputed": FP8Config(save="recompute"),
    "bf16": FP8Config.bf16(),
    "bf16, h recomputed": FP8Config.bf16(save="recompute"),
    "dgrad in bf16": FP8Config(dgrad="bf16"),
}


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


@check
def same_bits_as_one_process(ranks: Ranks) -> None:
    for name, config in CONFIGS.items():
        for kind in KINDS if name in ("fp8", "bf16") else KINDS[:2]:
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
    topk = [K - (rank == 1) for rank in range(ranks.size)]
    for args, message in (
        ((x, wrong, weights), f"topk_ids: expected ids 0 to {E}, got others on ranks [1]"),
        (
            (x, ids[:, fewer], weights[:, fewer]),
            f"K: expected the same on all ranks of ep_group, got {topk}",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            dispatch(*args, E, I, config=FP8Config(), group=ranks.group)
    with pytest.raises(ValueError, match="combine: expected the same on all ranks"):
        combine: Any = "sums" if ranks.rank else "rows"
        dispatch(x, ids, weights, E, I, config=FP8Config(), group=ranks.group, combine=combine)
    with pytest.raises(ValueError, match=f"num_experts: expected a multiple of the {ranks.size}"):
        Experts(E + 1, H, I, ep_group=ranks.group, device=ranks.device)
    pair = dist.new_group([0])
    if ranks.rank:
        with pytest.raises(ValueError, match="ep_group: expected a ProcessGroup with this rank"):
            Experts(E, H, I, ep_group=pair, device=ranks.device)
