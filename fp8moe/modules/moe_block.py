"""MoE blocks around a ModuleList of experts: what their forward computes, found out and redone.

Such a block routes, loops over its experts and sums, all in one forward; stacking the experts
replaces the whole block. Its routing is therefore reproduced, and compared with the block itself
on random tokens before anything changes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fp8moe.config import FP8Config
from fp8moe.modules.expert_list import ListedExperts, ListLayout, NotConvertible, inspect_list
from fp8moe.modules.probe import distance, evaluating

_GATES = ("gate", "router")
_TOP_K = ("top_k", "num_experts_per_tok", "topk")
_SHARED = ("shared_expert", "shared_experts")
_SHARED_GATE = "shared_expert_gate"
_JITTER = ("jitter_noise", "router_jitter_noise", "input_jitter_noise")
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class BlockLayout:
    """How a block routes and what it returns.

    Args:
        gate: name of the router. An nn.Linear gives logits, of which the softmax's `top_k` largest
            are taken, over their sum if `renormalize`. Any other module decides itself.
        shared: name of the MLP that every token passes, times sigmoid(shared_gate(x)) if there is
            one.
        returns_logits: forward returns (y, logits).
    """

    experts: ListLayout
    gate: str
    top_k: int
    renormalize: bool
    shared: str | None
    shared_gate: str | None
    returns_logits: bool


class _AddLoss(torch.autograd.Function):
    """y, with a loss hung on: its gradient is 1 wherever y has one."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss = loss.detach()
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, torch.ones_like(ctx.loss)


@dataclass(frozen=True)
class _Routing:
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    logits: torch.Tensor | None
    loss: torch.Tensor | None


def _softmax_topk(logits: torch.Tensor, layout: BlockLayout, dtype: torch.dtype) -> _Routing:
    weights, ids = logits.float().softmax(dim=-1).topk(layout.top_k, dim=-1)
    if layout.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return _Routing(ids, weights.to(dtype), logits, None)


def _own_routing(output: Any, layout: BlockLayout) -> _Routing:
    """ids, weights, logits and a loss, told apart by type and shape in a router's tuple."""
    ids = weights = logits = loss = None
    parts = [part for part in output if isinstance(part, torch.Tensor)]
    for part in parts:
        if not part.dtype.is_floating_point and ids is None and part.dim() >= 2:
            ids = part.reshape(-1, part.shape[-1])
    for part in parts:
        if not part.dtype.is_floating_point or ids is None:
            continue
        if part.dim() == 0:
            loss = part
        elif part.shape[-1] == ids.shape[-1] and part.numel() == ids.numel() and weights is None:
            weights = part.reshape(ids.shape)
        elif part.shape[-1] == layout.experts.num_experts and logits is None:
            logits = part
    if ids is None or weights is None:
        raise NotConvertible(f"{layout.gate} returns no expert ids with weights of their shape")
    return _Routing(ids, weights, logits, loss)


def _route(block: Any, x: torch.Tensor, layout: BlockLayout) -> _Routing:
    gate = getattr(block, layout.gate)
    if isinstance(gate, nn.Linear):
        return _softmax_topk(gate(x.reshape(-1, x.shape[-1])), layout, x.dtype)
    output = gate(x)
    if not isinstance(output, tuple | list):
        raise NotConvertible(
            f"{layout.gate} ({type(gate).__name__}) returns a {type(output).__name__}; expected a "
            "tuple with expert ids and weights"
        )
    return _own_routing(output, layout)


def _finish(block: Any, x: torch.Tensor, y: torch.Tensor, r: _Routing, layout: BlockLayout) -> Any:
    if r.loss is not None and r.loss.requires_grad:
        y = _AddLoss.apply(y, r.loss)
    y = y.reshape(x.shape)
    if layout.shared is not None:
        shared = getattr(block, layout.shared)(x)
        if layout.shared_gate is not None:
            shared = torch.sigmoid(getattr(block, layout.shared_gate)(x)) * shared
        y = y + shared
    if not layout.returns_logits:
        return y
    if r.logits is None:
        raise NotConvertible("the block returns router logits, which its router does not give")
    return y, r.logits


class ListedMoE(nn.Module):
    """A MoE block with stacked experts: y = experts(x, routing(x)) + shared(x).

    Submodules keep their names and objects, and the experts their state-dict keys, so a state dict
    is the one of the block that this one replaces.

    Args:
        block: the block to replace, as checked by `inspect_block`.
        layout: from `inspect_block`.
        config: precision of the experts' GEMMs.
    """

    def __init__(self, block: nn.Module, layout: BlockLayout, config: FP8Config) -> None:
        super().__init__()
        self.layout = layout
        for name, child in block.named_children():  # in the block's order, which keys follow
            if isinstance(child, nn.ModuleList):
                child = ListedExperts(child, layout.experts, config)
            setattr(self, name, child)
        self.training = block.training

    def forward(self, hidden_states: torch.Tensor) -> Any:
        r = _route(self, hidden_states, self.layout)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts: Any = self.experts
        y = experts(x, r.topk_ids, r.topk_weights).to(x.dtype)
        return _finish(self, hidden_states, y, r, self.layout)


def _looped(block: Any, x: torch.Tensor, layout: BlockLayout) -> Any:
    """The block's output with its experts called one by one, as the layout understands it."""
    r = _route(block, x, layout)
    flat = x.reshape(-1, x.shape[-1])
    y = torch.zeros_like(flat)
    for e, expert in enumerate(block.experts):
        weight = (r.topk_weights * (r.topk_ids == e)).sum(dim=-1, keepdim=True).to(flat.dtype)
        y = y + weight * expert(flat)
    return _finish(block, x, y, r, layout)


def _first(block: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if getattr(block, name, None) is not None), None)


def _read(block: Any, config: FP8Config) -> BlockLayout:
    """What attributes tell. `renormalize` and `returns_logits` may still be wrong."""
    gate, shared = _first(block, _GATES), _first(block, _SHARED)
    if gate is None:
        raise NotConvertible(f"{type(block).__name__} has no {' or '.join(_GATES)}")
    layout = inspect_list(block.experts, config)
    shared_gate = _SHARED_GATE if getattr(block, _SHARED_GATE, None) is not None else None
    top_k = _first(block, _TOP_K)
    if isinstance(getattr(block, gate), nn.Linear) and top_k is None:
        raise NotConvertible(f"{type(block).__name__} has no {' or '.join(_TOP_K)}")
    known = {"experts", gate, shared, shared_gate}
    for name, child in block.named_children():
        if name not in known:
            raise NotConvertible(
                f"{type(block).__name__}.{name} ({type(child).__name__}) has no known place"
            )
    own = [name for name, _ in block.named_parameters(recurse=False)]
    own += [name for name, _ in block.named_buffers(recurse=False)]
    if own:
        raise NotConvertible(f"{type(block).__name__} has tensors of its own: {', '.join(own)}")
    for name in _JITTER:
        if getattr(block, name, None):
            raise NotConvertible(f"{name} = {getattr(block, name)}; expected 0")
    return BlockLayout(
        experts=layout,
        gate=gate,
        top_k=0 if top_k is None else int(getattr(block, top_k)),
        renormalize=bool(getattr(block, "norm_topk_prob", True)),
        shared=shared,
        shared_gate=shared_gate,
        returns_logits=False,
    )


def _outputs(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y,) or (y, logits) of the block itself."""
    kind = type(block).__name__
    try:
        output = block(x)
    except Exception as error:  # whatever a foreign forward may raise on a call it does not expect
        raise NotConvertible(f"{kind}.forward(hidden_states): {error!r}") from error
    outputs = output if isinstance(output, tuple) else (output,)
    if len(outputs) > 2 or not all(isinstance(part, torch.Tensor) for part in outputs):
        found = ", ".join(type(part).__name__ for part in outputs)
        raise NotConvertible(f"{kind} returns ({found}); expected y or (y, router logits)")
    return outputs


def inspect_block(block: Any, config: FP8Config) -> BlockLayout:
    """Find out how a block with `experts: nn.ModuleList` routes and returns. Changes nothing.

    The block runs on 32 random tokens, in evaluation mode, and must give what the layout says, but
    for rounding.

    Raises: NotConvertible, saying what is in the way.
    """
    layout = _read(block, config)
    like = getattr(block.experts[0], layout.experts.names[0]).weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBE_TOKENS, layout.experts.hidden_size, generator=generator)
    x = x.to(like.device, like.dtype)
    # Without the attribute either is possible; with it, only what it says.
    renormalize = [layout.renormalize] if hasattr(block, "norm_topk_prob") else [True, False]
    distances = dict.fromkeys(renormalize, 0.0)
    with evaluating(block):
        # Small tokens have even scores, whose top-k sum is far from 1.
        for probe in (0.1 * x, x):
            expected = _outputs(block, probe)
            layout = dataclasses.replace(layout, returns_logits=len(expected) == 2)
            for norm in renormalize:
                ours = _looped(block, probe, dataclasses.replace(layout, renormalize=norm))
                pairs = zip(ours if len(expected) == 2 else (ours,), expected, strict=True)
                distances[norm] = max(distances[norm], *(distance(a, b) for a, b in pairs))
    best = min(renormalize, key=lambda norm: distances[norm])
    # Sums of a few experts' outputs in another order; another routing is off by far more.
    bound = max(1e-5, 4 * torch.finfo(like.dtype).eps)
    if not distances[best] <= bound:
        raise NotConvertible(
            f"{type(block).__name__} computes something else than top-k routing to its experts: "
            f"on random tokens the outputs differ by {distances[best]:.2g} of their norm "
            f"(allowed {bound:.2g})"
        )
    return dataclasses.replace(layout, renormalize=best)
