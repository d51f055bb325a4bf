"""The expert layer's pieces as separate differentiable functions, on the padded layout.

The fused path in experts.py does not use them; a layer with a GEMM in BF16, or with sizes that
are not multiples of 128, is composed of them.

Padded layout: slot t * K + k is token t's k-th choice; every expert's rows start at a multiple of
128 and come in slot order; padding rows are zero; rows past the last expert are undefined and never
read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fp8moe.config import FP8Config
from fp8moe.functional.saved import compress, expand, restore
from fp8moe.kernels.permute import gather_slots, gather_sum, permute_rows, route


class Permutation(NamedTuple):
    """Where each routed slot's row is, and which slot each row holds.

    Args:
        row_of_slot: (T, K) int32, the slot's row, -1 for a dropped slot.
        slot_of_row: (Rcap,) int32, the row's slot, -1 in an expert's padding, -2 past the last one.
        group_ends: (E,) int32, cumulative ends of the experts' rows, multiples of 128.
        num_tokens_per_expert: (E,) int32, rows of each expert without padding.
    """

    row_of_slot: torch.Tensor
    slot_of_row: torch.Tensor
    group_ends: torch.Tensor
    num_tokens_per_expert: torch.Tensor

    @classmethod
    def of(cls, topk_ids: torch.Tensor, num_experts: int) -> Permutation:
        return cls(*route(topk_ids, num_experts))


class PermuteRows(torch.autograd.Function):
    """x_R[row_of_slot[t, k]] = x_T[t]; the gradient is the sum over a token's rows."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_of_slot)
        return permute_rows(x, row_of_slot, slot_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> Any:
        (row_of_slot,) = ctx.saved_tensors
        return gather_sum(dx.contiguous(), row_of_slot), None, None


class GatherSum(torch.autograd.Function):
    """y_T[t] = sum_k y_R[row_of_slot[t, k]]; the gradient is copied to each of the rows."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_of_slot, slot_of_row)
        return gather_sum(y, row_of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return permute_rows(dy.contiguous(), *ctx.saved_tensors), None, None


def _weight_of_row(topk_weights: torch.Tensor, slot_of_row: torch.Tensor) -> torch.Tensor:
    if topk_weights.numel() == 0:  # under expert parallelism: no token came to this rank
        return topk_weights.new_zeros((slot_of_row.shape[0], 1))
    p = topk_weights.reshape(-1).index_select(0, slot_of_row.clamp_min(0))
    return p.masked_fill(slot_of_row < 0, 0.0).unsqueeze(1)


def weighted_gate(
    gate: Callable[[torch.Tensor], torch.Tensor],
    h: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
) -> torch.Tensor:
    """aw[r] = p[r] * gate(h[r]) in FP32, for a gate that torch differentiates; (R, I) BF16."""
    return (gate(h.float()) * _weight_of_row(topk_weights, slot_of_row)).bfloat16()


class WeightedSwiglu(torch.autograd.Function):
    """aw[r] = p[r] * silu(g[r]) * u[r], h = [g | u], p the routing weight of row r, in FP32.

    Padding has h = 0 and gives zeros; rows past the last expert are computed from whatever memory
    holds there, and never read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        topk_weights: torch.Tensor,
        row_of_slot: torch.Tensor,
        slot_of_row: torch.Tensor,
        config: FP8Config,
    ) -> torch.Tensor:
        ctx.config = config
        saved = compress(h, row_of_slot, config) if config.save == "fp8" else (h, None)
        ctx.save_for_backward(*saved, topk_weights, row_of_slot, slot_of_row)
        g, u = h.float().chunk(2, dim=1)
        return (_weight_of_row(topk_weights, slot_of_row) * (F.silu(g) * u)).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: torch.Tensor) -> Any:
        h, h_scale, topk_weights, row_of_slot, slot_of_row = ctx.saved_tensors
        if h_scale is not None:
            h = expand(restore(h, h_scale), ctx.config)
        need_h, need_p = ctx.needs_input_grad[:2]
        g, u = h.float().chunk(2, dim=1)
        grad = da.float()
        s = torch.sigmoid(g)
        silu = g * s
        dh = dp = None
        if need_p:
            dp = gather_slots((grad * silu * u).sum(dim=1).unsqueeze(0), row_of_slot)
        if need_h:
            grad = grad * _weight_of_row(topk_weights, slot_of_row)
            dg = grad * u * s * (1 + g * (1 - s))
            dh = torch.cat([dg.bfloat16(), (grad * silu).bfloat16()], dim=1)
        return dh, dp, None, None, None


class NoRows(torch.autograd.Function):
    """An empty result that still gives its inputs zero gradients, which data parallelism awaits."""

    @staticmethod
    def forward(
        ctx: Any, shape: tuple[int, ...], dtype: torch.dtype, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs]
        return torch.empty(shape, dtype=dtype, device=inputs[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        grads = [
            torch.zeros(shape, dtype=dtype, device=device) if need else None
            for need, (shape, dtype, device) in zip(ctx.needs_input_grad[2:], ctx.like, strict=True)
        ]
        return None, None, *grads
