"""Layers to test with: inputs, one forward and backward, and the same in FP64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch

from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.functional import clear_weight_cache, swiglu_experts


class Result(NamedTuple):
    """The output of the layer and its gradients."""

    y: torch.Tensor
    dx: torch.Tensor
    dprob: torch.Tensor
    dw13: torch.Tensor
    dw2: torch.Tensor

    def equal(self, other: Result) -> dict[str, bool]:
        pairs = zip(self._fields, self, other, strict=True)
        return {name: torch.equal(a, b) for name, a, b in pairs}


@dataclass(frozen=True)
class Layer:
    """Inputs of one expert layer, and the gradient of its output."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    dy: torch.Tensor

    def but(self, **changes: torch.Tensor) -> Layer:
        return replace(self, **changes)

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """Fresh x, weights, w13, w2 that require gradients."""
        tensors = (self.x, self.weights, self.w13, self.w2)
        return tuple(t.detach().clone().requires_grad_() for t in tensors)

    def forward(self, x: Any, weights: Any, w13: Any, w2: Any, config: FP8Config) -> torch.Tensor:
        return swiglu_experts(x, self.ids, weights, w13, w2, config=config)

    def run(self, config: FP8Config | None = None) -> Result:
        leaves = self.leaves()
        y = self.forward(*leaves, config or FP8Config())
        return Result(y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype)))

    def exact(self) -> Result:
        """FP64 on the unquantized inputs, one expert after the other."""
        x, weights, w13, w2 = (t.detach().double().requires_grad_() for t in self.leaves())
        y = torch.zeros_like(x)
        for e in range(w13.shape[0]):
            token, k = (self.ids == e).nonzero(as_tuple=True)
            gate, up = (x[token] @ w13[e].t()).chunk(2, dim=1)
            rows = weights[token, k, None] * (torch.nn.functional.silu(gate) * up) @ w2[e].t()
            y = y.index_add(0, token, rows)
        grads = torch.autograd.grad(y, (x, weights, w13, w2), self.dy.double())
        return Result(y.detach(), *grads)


@pytest.fixture
def make_layer(device: torch.device) -> Callable[..., Layer]:
    """Gaussian inputs at the scale of a trained layer: h and y of order 1."""

    def make(
        tokens: int = 192,
        topk: int = 2,
        experts: int = 4,
        hidden: int = 256,
        inner: int = 128,
        *,
        kind: str = "uniform",
        dropped: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        weight_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Layer:
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g)

        ids, weights = testing.random_topk(tokens, topk, experts, seed, kind, dropped)
        layer = Layer(
            randn(tokens, hidden).to(dtype),
            ids,
            weights,
            (randn(experts, 2 * inner, hidden) / hidden**0.5).to(weight_dtype),
            (randn(experts, hidden, inner) / inner**0.5).to(weight_dtype),
            randn(tokens, hidden).to(dtype),
        )
        moved = {name: t.to(device) for name, t in vars(layer).items()}
        return Layer(**moved)

    return make


@pytest.fixture(autouse=True)
def _fresh_weight_cache() -> None:
    clear_weight_cache()
