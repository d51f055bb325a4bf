"""Checks of one expert-parallel layer against the same layer in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dispatch_ranks import E, H, I, K, Ranks, any_rank, check
from torch.utils.checkpoint import checkpoint

from fp8moe import FP8Config, swiglu_experts, testing
from fp8moe.functional import expert_parallel
from fp8moe.functional.exchange import Exchange, Message
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


def batch(
    kind: str, device: torch.device, tokens: int = 132, experts: int = E
) -> tuple[torch.Tensor, ...]:
    """x, ids, weights, w13, w2, dy of all ranks, the same on each."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = 0 if kind == "no tokens" else tokens
    topk = min(K, experts)
    ids, weights = testing.random_topk(tokens, topk, experts, 0, dropped=0.1)
    if kind == "a rank without work":
        ids = torch.where(ids < E // 2, ids + E // 2, ids)
    elif kind == "all on one rank":
        ids = torch.where(ids == E, ids, ids % 2)
    elif kind == "one expert":
        ids = torch.full_like(ids, E - 1)
    elif kind == "all dropped":
        ids = torch.full_like(ids, E)
    elif kind == "an expert twice":
        ids = torch.where(ids == E, ids, ids // 3)
    x, dy = normal(tokens, H).bfloat16(), normal(tokens, H).bfloat16()
    w13, w2 = normal(experts, 2 * I, H) * 0.1, normal(experts, H, I) * 0.1
    return tuple(t.to(device) for t in (x, ids, weights, w13, w2, dy))


KINDS = (
    "uniform",
    "a rank without work",
    "all on one rank",
    "one expert",
    "all dropped",
    "an expert twice",
    "no tokens",
)


def both(
    ranks: Ranks,
    config: FP8Config,
    kind: str = "uniform",
    combine: Any = "rows",
    *,
    experts: int = E,
    dtype: torch.dtype = torch.bfloat16,
    frozen: tuple[str, ...] = (),
    recomputed: bool | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """y and the gradients: of this rank, and the same part of one process' results.

    frozen: those of x, p, w13 and w2 that need no gradient. recomputed: under activation
    checkpointing, True for the reentrant kind.
    """
    x, ids, weights, w13, w2, dy = batch(kind, ranks.device, experts=experts)
    x, dy, at = x.to(dtype), dy.to(dtype), ranks.tokens(len(x))
    here = ranks.experts_of(experts)
    names = "x", "p", "w13", "w2"

    def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
        named = zip(names, tensors, strict=True)
        return [t.clone().requires_grad_(name not in frozen) for name, t in named]

    def spread(x: torch.Tensor, p: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        options = {"config": config, "group": ranks.group, "combine": combine}
        tokens = dispatch(x, ids[at], p, experts, I, **options)
        return expert_parallel_swiglu(tokens, x, p, *w)

    whole = leaves(x, weights, w13, w2)
    y = swiglu_experts(whole[0], ids, *whole[1:], config=config)
    y.backward(dy)
    mine = leaves(x[at], weights[at], w13[here], w2[here])
    if recomputed is None:
        z = spread(*mine)
    else:
        z = checkpoint(spread, *mine, use_reentrant=recomputed)
    z.backward(dy[at])
    got, expected = {"y": z.detach()}, {"y": y.detach()[at]}
    for name, t, w, part in zip(names, mine, whole, (at, at, here, here), strict=True):
        assert (t.grad is None) == (name in frozen)
        if t.grad is not None:
            got[f"d{name}"], expected[f"d{name}"] = t.grad, w.grad[part]
    return got, expected


def differing(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    same = {n: t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in got.items()}
    return {name for name, equal in same.items() if not equal}


@check
def same_bits_as_one_process(ranks: Ranks) -> None:
    for name, config in CONFIGS.items():
        for kind in KINDS if name in ("fp8", "bf16") else KINDS[:2]:
            got, expected = both(ranks, config, kind)
            assert differing(got, expected) == set(), (name, kind, differing(got, expected))


@check
def same_bits_in_corners(ranks: Ranks) -> None:
    """Input dtypes, gradients that nobody asks for, recomputation, one expert on each rank."""
    fp8, bf16 = FP8Config(), FP8Config.bf16()
    corners: list[tuple[FP8Config, dict[str, Any]]] = [
        *((c, {"dtype": dtype}) for c in (fp8, bf16) for dtype in (torch.float16, torch.float32)),
        *((c, {"recomputed": kind}) for c in (fp8, bf16) for kind in (True, False)),
        *((c, {"experts": ranks.size}) for c in (fp8, bf16)),
        *((c, {"frozen": f}) for c in (fp8, bf16) for f in (("w13", "w2"), ("x", "p"), ("w2",))),
    ]
    for config, options in corners:
        got, expected = both(ranks, config, **options)
        assert differing(got, expected) == set(), (config, options, differing(got, expected))


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
def spared_sms_change_no_bit(ranks: Ranks) -> None:
    before = expert_parallel.SPARED_SMS
    expert_parallel.SPARED_SMS = 100
    try:
        got, expected = both(ranks, FP8Config())
    finally:
        expert_parallel.SPARED_SMS = before
    assert differing(got, expected) == set()


@check
def planted_errors_are_found(ranks: Ranks) -> None:
    """Negative control of the two checks above: each fault shows in y or a gradient."""
    config = FP8Config()

    def with_fault(kind: type, name: str, fault: Callable[..., Any]) -> set[str]:
        original = getattr(kind, name)
        setattr(kind, name, lambda self, *args: fault(original, self, *args))
        try:
            got, expected = both(ranks, config)
        finally:
            setattr(kind, name, original)
        return {n for n in got if any_rank(ranks, n in differing(got, expected))}

    def doubled_scale(wait: Any, self: Message) -> Any:
        parts = wait(self)
        return parts._replace(scale=parts.scale * 2)

    def doubled_weights(receive: Any, self: Exchange, routing: torch.Tensor) -> Any:
        return receive(self, routing) * 2

    def reversed_tokens(
        pack: Any, self: Message, exchange: Exchange, x: torch.Tensor, *more: Any
    ) -> Any:
        return pack(self, exchange, x.flip(0), *more)

    def reversed_order(send: Any, self: Exchange, rows: torch.Tensor) -> Any:
        return send(self, rows.flip(0))

    def slots_of_the_next_token(send: Any, self: Exchange, values: torch.Tensor) -> Any:
        return send(self, values.roll(1, 0))

    assert with_fault(Message, "wait", doubled_scale) >= {"y", "dw13", "dw2"}
    assert with_fault(Message, "__init__", reversed_tokens) >= {"y", "dx", "dp", "dw13", "dw2"}
    assert with_fault(Exchange, "receive", doubled_weights) >= {"y", "dx", "dw13", "dw2"}
    assert with_fault(Exchange, "return_rows", reversed_order) == {"y", "dx"}
    assert with_fault(Exchange, "return_slots", slots_of_the_next_token) == {"dp"}


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
    mixed: tuple[dict[str, Any], ...] = (
        {"combine": "sums" if ranks.rank else "rows", "config": FP8Config()},
        {"config": FP8Config(dgrad="bf16" if ranks.rank else "fp8")},
        {"config": FP8Config(pow2_scales=bool(ranks.rank))},
    )
    for options, name in zip(mixed, ("combine", "FP8", "pow2_scales"), strict=True):
        with pytest.raises(ValueError, match=f"{name}: expected the same on all ranks"):
            dispatch(x, ids, weights, E, I, group=ranks.group, **options)
    with pytest.raises(ValueError, match=f"num_experts: expected a multiple of the {ranks.size}"):
        Experts(E + 1, H, I, ep_group=ranks.group, device=ranks.device)
    # What new_group gives to the ranks that are not in it.
    with pytest.raises(ValueError, match="ep_group: expected a ProcessGroup with this rank"):
        Experts(E, H, I, ep_group=dist.GroupMember.NON_GROUP_MEMBER, device=ranks.device)
