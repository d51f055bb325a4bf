"""A model with one DeepSpeed MoE layer, and the engines that the tests run it with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 128, 128, 4, 64


class Swiglu(nn.Module):
    """An expert as users write it."""

    def __init__(self, bias: bool = False, activation: Any = F.silu, names: str = "llama") -> None:
        super().__init__()
        self.activation = activation
        self.names = {
            "llama": ("gate_proj", "up_proj", "down_proj"),
            "mixtral": ("w1", "w3", "w2"),
            "fused": ("gate_up_proj", "down_proj"),
        }[names]
        sizes = [(HIDDEN, INTERMEDIATE * (3 - len(self.names[:-1])))] * len(self.names[:-1])
        for name, (k, n) in zip(self.names, [*sizes, (INTERMEDIATE, HIDDEN)], strict=True):
            setattr(self, name, nn.Linear(k, n, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *gate_up, down = (getattr(self, name) for name in self.names)
        gate, up = torch.cat([layer(x) for layer in gate_up], dim=-1).chunk(2, dim=-1)
        return down(self.activation(gate) * up)


def moe_layer(expert: nn.Module | None = None, **options: Any) -> Any:
    """deepspeed.moe.layer.MoE with experts that differ from each other; the same for every call."""
    from deepspeed.moe.layer import MoE

    torch.manual_seed(7)
    settings: dict[str, Any] = dict(k=2, capacity_factor=1.0, top2_2nd_expert_sampling=False)
    settings |= options
    ep_size = settings.pop("ep_size", 1)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    moe = MoE(HIDDEN, expert or Swiglu(), EXPERTS, ep_size, **settings)
    local = EXPERTS // ep_size
    with torch.no_grad():
        for e, module in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(rank % ep_size * local + e)
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 2 / p.shape[-1] ** 0.5)
    return moe


class Model(nn.Module):
    """loss(x) = mean squared error of the MoE layer's output against a fixed pattern."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(HIDDEN, HIDDEN)
        self.moe = moe_layer(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, aux, _ = self.moe(self.before(x))
        return (y.float() - x.float().flip(-1)).square().mean() + 0.01 * aux


def batches(count: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn((2, TOKENS, HIDDEN), generator=generator).to(dtype) for _ in range(count)]


def initialize(model: nn.Module, stage: int, **config: Any) -> Any:
    """The DeepSpeed engine of a model, in FP32 with SGD unless the config says otherwise."""
    import deepspeed
    from deepspeed.moe.utils import (
        has_moe_layers,
        split_params_into_different_moe_groups_for_optimizer,
    )

    parameters: Any = list(model.parameters())
    if has_moe_layers(model)[0]:
        group = {"params": parameters, "name": "all"}
        parameters = split_params_into_different_moe_groups_for_optimizer(group)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    } | config
    return deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]


def train(engine: Any, data: list[torch.Tensor]) -> list[float]:
    """One backward and step for each batch; the losses."""
    losses = []
    for x in data:
        loss = engine(x.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
