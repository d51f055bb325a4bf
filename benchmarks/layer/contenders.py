"""The layers that compete: each maps (x, ids, probs, w13, w2) to y, differentiably."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fp8moe
from benchmarks.layer.workload import Inputs

Layer = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]

BASELINE = "torch bf16"


def _swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


@functools.cache
def fused_swiglu(device_type: str) -> Callable[[torch.Tensor], torch.Tensor]:
    # One fused kernel each way on the GPU, as any tuned BF16 layer has.
    return torch.compile(_swiglu, dynamic=False) if device_type == "cuda" else _swiglu


class ToRows(torch.autograd.Function):
    """Tokens to their rows in expert order. A gather both ways: torch's gradient of `index_select`
    is an `index_add` with BF16 atomics, 2 ms for each of the layer's two on an H100."""

    @staticmethod
    def forward(ctx, x, token_of_row, row_of_slot, topk):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_of_slot)
        ctx.topk = topk
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (row_of_slot,) = ctx.saved_tensors
        return dy.index_select(0, row_of_slot).unflatten(0, (-1, ctx.topk)).sum(1), None, None, None


class ToSlots(torch.autograd.Function):
    """Rows in expert order back to (token, choice) order, a gather both ways."""

    @staticmethod
    def forward(ctx, y, order, row_of_slot):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order)
        return y.index_select(0, row_of_slot)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


def torch_bf16(
    x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """torch's grouped GEMMs between torch's index operations; no host synchronisation."""
    topk = ids.shape[1]
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    row_of_slot = torch.empty_like(order)
    row_of_slot[order] = torch.arange(order.numel(), device=order.device)
    experts = torch.arange(w13.shape[0], device=flat.device)
    ends = torch.searchsorted(flat[order], experts, right=True).to(torch.int32)
    rows = ToRows.apply(x, order // topk, row_of_slot, topk)
    h = F.grouped_mm(rows, w13.transpose(1, 2), offs=ends)
    a = fused_swiglu(x.device.type)(h)
    y = F.grouped_mm(a, w2.transpose(1, 2), offs=ends)
    y = ToSlots.apply(y, order, row_of_slot).view(*ids.shape, -1)
    return (y * probs.to(y.dtype).unsqueeze(-1)).sum(dim=1)


def _fp8moe(config: fp8moe.FP8Config) -> Layer:
    def layer(
        x: torch.Tensor,
        ids: torch.Tensor,
        probs: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
    ) -> torch.Tensor:
        return fp8moe.swiglu_experts(x, ids, probs, w13, w2, config=config)

    return layer


FP8MOE: dict[str, Layer] = {
    f"fp8moe {save}": _fp8moe(fp8moe.FP8Config(save=save)) for save in ("fp8", "bf16", "recompute")
}
"""fp8moe with each way of saving the hidden activation; FP8 weights come from the cache."""

CONTENDERS: dict[str, Layer] = {**FP8MOE, BASELINE: torch_bf16}


def forward(layer: Layer, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Forward as in training: gradients enabled."""
    return lambda: layer(inputs.x, inputs.ids, inputs.probs, inputs.w13, inputs.w2)


def step(layer: Layer, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward, and the gradients of x, the routing weights, w13 and w2."""
    run = forward(layer, inputs)
    return lambda: torch.autograd.grad(run(), inputs.leaves, inputs.dy)
