"""MoE: router, experts and optional shared experts in one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fp8moe.modules.experts import Experts
from fp8moe.modules.router import Router

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MoEOutput(NamedTuple):
    """Args:
    y: the shape of the layer's input.
    aux_loss: float32 scalar, the router's losses times their coefficients: add it to the loss.
    """

    y: torch.Tensor
    aux_loss: torch.Tensor


class SharedExperts(nn.Module):
    """y = sigmoid(x gate^T) * (silu(g) * u) w2^T, [g | u] = x w13^T: an MLP for every token.

    Ordinary torch layers: autocast decides their precision.

    Args:
        hidden_size: H.
        intermediate_size: I of all shared experts together.
        gated: have the sigmoid gate (Qwen-MoE); without it y = (silu(g) * u) w2^T (DeepSeek).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def linear(n: int, k: int) -> nn.Linear:
            return nn.Linear(k, n, bias=False, device=device, dtype=dtype)

        self.w13 = linear(2 * intermediate_size, hidden_size)
        self.w2 = linear(hidden_size, intermediate_size)
        self.gate = linear(1, hidden_size) if gated else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, out_std: float | None = None) -> None:
        """w13 and gate ~ normal(0, std), w2 ~ normal(0, out_std or std), all cut at 3 std."""
        for layer in (self.w13, self.w2, self.gate):
            if layer is not None:
                s = out_std if layer is self.w2 and out_std is not None else std
                nn.init.trunc_normal_(layer.weight, std=s, a=-3 * s, b=3 * s)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        y = self.w2(F.silu(gate) * up)
        return y if self.gate is None else torch.sigmoid(self.gate(x)) * y


class MoE(nn.Module):
    """y = experts(x, router(x)) + shared_experts(x)

    Returns a pair, so that the auxiliary loss has its gradient wherever the layer runs: under both
    kinds of activation checkpointing and torch.compile, where an attribute would lose it.

        y, aux_loss = moe(x)

    Args:
        router: chooses the experts.
        experts: with the router's number of experts and hidden size.
        shared_experts: any module from (T, H) to (T, H), for example SharedExperts. With an
            ep_group it runs while the tokens travel to their experts.
        ep_group: spread the experts over its ranks (`experts.shard`); not for experts that were
            made with an ep_group themselves.

    Attributes:
        last_load: (E,) int64, tokens of each expert in the last forward; zeros before. The next
            forward writes to the same tensor. Not a buffer.

    Shapes: forward takes x (..., H) and returns MoEOutput(y (..., H), aux_loss).

    Raises: ValueError if router and experts do not fit together.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        *,
        ep_group: dist.ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        sizes = (router.num_experts, router.hidden_size)
        if (experts.num_experts, experts.hidden_size) != sizes:
            raise ValueError(
                f"experts: expected (num_experts, hidden_size) = {sizes} of the router, "
                f"got {(experts.num_experts, experts.hidden_size)}"
            )
        if ep_group is not None:
            experts.shard(ep_group)
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        device = router.gate.weight.device
        self.last_load = torch.zeros(router.num_experts, dtype=torch.int64, device=device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoE:
        super()._apply(fn, recurse)
        self.last_load = fn(self.last_load)
        return self

    def forward(self, x: torch.Tensor) -> MoEOutput:
        x_TH = x.reshape(-1, x.shape[-1])
        routed = self.router(x_TH)
        batch = x_TH, routed.topk_ids, routed.topk_weights
        sent: tuple[Any, ...] = ()
        if getattr(self.experts, "ep_mesh", None) is not None:
            sent = (self.experts.dispatch(*batch),)
        shared_TH = None if self.shared_experts is None else self.shared_experts(x_TH)
        y_TH = self.experts(*batch, *sent)
        if shared_TH is not None:
            y_TH = y_TH + shared_TH
        load = routed.num_tokens_per_expert
        if self.last_load.device != load.device:  # parameters moved one by one, by FSDP say
            self.last_load = torch.empty_like(load)
        # In place: torch.compile allows that, and no new attribute, where activations are
        # checkpointed.
        self.last_load.copy_(load)
        return MoEOutput(y_TH.reshape(x.shape), routed.aux_loss)
