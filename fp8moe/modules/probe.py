"""What a module of other people computes, found out by running it on random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """eval() without gradients inside, every submodule's own mode again outside."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|"""
    b = b.float()
    return float((a.float().reshape(b.shape) - b).norm() / b.norm().clamp_min(1e-30))
