"""AdamW on FP32 master weights, gradient clipping without a host sync, and the learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fp8moe.modules import clip_grad_norm_, expert_parameters

from .config import Config


def learning_rate(config: Config, step: int) -> float:
    """Linear from 0 over ``warmup_steps``, then a cosine from ``lr`` to ``lr * min_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)


class ClippedAdamW:
    """AdamW whose update is scaled to a gradient norm of at most ``clip``, on the device.

    The parameters are FP32 and are the master weights: the forward casts them. The fused AdamW
    kernel divides each gradient by ``grad_scale`` while it reads it, so clipping costs no pass of
    its own, and skips the update when ``found_inf`` is 1: a step whose gradients are not finite
    leaves weights and moments as they were.
    """

    def __init__(self, model: nn.Module, config: Config):
        self.config = config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Those spread over ranks: the fused kernel takes no mixture with plain tensors.
        self.sharded = list(expert_parameters(model))
        own = {id(p) for p in self.sharded}
        matrices = [p for p in self.parameters if p.ndim >= 2 and id(p) not in own]
        vectors = [p for p in self.parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
            {"params": self.sharded, "weight_decay": config.weight_decay},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )

    def step(self, step: int) -> Tensor:
        """Updates the weights and frees the gradients.

        Returns:
            The gradient norm before clipping, a float32 scalar on the device; not finite if the
            update was skipped.
        """
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, step)
        if self.sharded:
            norm = self._step_over_ranks()
        else:
            norm = self._step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def _step_over_ranks(self) -> Tensor:
        """The kernel's own clipping knows no DTensors. The norm is read on the host."""
        norm = clip_grad_norm_(self.parameters, self.config.clip)
        if norm.isfinite():
            self.adamw.step()
        return norm

    def _step(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        # Attributes that torch's own GradScaler hands to a fused optimizer in the same way.
        setattr(self.adamw, "grad_scale", (norm / self.config.clip).clamp_min(1.0))  # noqa: B010
        setattr(self.adamw, "found_inf", (~norm.isfinite()).float())  # noqa: B010
        self.adamw.step()
        return norm
