"""The layers that are measured: sizes, routing, and the tensors that go in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.memory import SHAPES, Shape
from fp8moe import testing

ROUTINGS = ("balanced", "zipf", "half", "empty")
"""balanced: experts drawn uniformly. zipf: expert e proportional to 1 / (e + 1). half: expert 0
takes half of all rows (a token may then choose it several times). empty: the second half of the
experts gets nothing."""


@dataclass(frozen=True)
class Inputs:
    """Leaves of one layer, its routing, and the gradient of its output.

    Args:
        x, dy: (T, H) BF16. ids: (T, K) int64. probs: (T, K) FP32.
        w13: (E, 2I, H) BF16. w2: (E, H, I) BF16.
    """

    shape: Shape
    x: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    dy: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.probs, self.w13, self.w2

    @property
    def flops(self) -> float:
        """Forward and backward: three GEMMs of 2RHI each way of three matrices."""
        rows = self.shape.tokens * self.shape.topk
        return 18.0 * rows * self.shape.hidden * self.shape.intermediate


def parse_shape(text: str) -> tuple[str, Shape]:
    """A name of SHAPES, or sizes "T,K,E,H,I".

    Raises: ValueError for anything else.
    """
    if text in SHAPES:
        return text, SHAPES[text]
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 5 or min(sizes) < 1:
        raise ValueError(f"shape: expected {', '.join(SHAPES)} or T,K,E,H,I, got {text!r}")
    return text, Shape(*sizes)


def route(shape: Shape, routing: str, device: torch.device, seed: int = 0) -> torch.Tensor:
    """topk_ids (T, K) int64 of one of ROUTINGS.

    Raises: ValueError for an unknown routing, or too few experts for it.
    """
    tokens, topk, experts = shape[:3]
    if routing in ("balanced", "zipf"):
        kind = "uniform" if routing == "balanced" else "zipf"
        return testing.random_topk(tokens, topk, experts, seed, kind)[0].to(device)
    if routing == "empty":
        if experts // 2 < topk:
            raise ValueError(f"routing empty: expected at least {2 * topk} experts, got {experts}")
        return testing.random_topk(tokens, topk, experts // 2, seed)[0].to(device)
    if routing == "half":
        generator = torch.Generator().manual_seed(seed)
        if experts < 2:
            raise ValueError(f"routing half: expected at least 2 experts, got {experts}")
        ids = torch.randint(1, experts, (tokens, topk), generator=generator)
        flat = ids.flatten()
        flat[torch.randperm(flat.numel(), generator=generator)[: flat.numel() // 2]] = 0
        return ids.to(device)
    raise ValueError(f"routing: expected {', '.join(ROUTINGS)}, got {routing!r}")


def make_inputs(shape: Shape, device: torch.device, routing: str = "balanced") -> Inputs:
    """Gaussian tensors at the scale of a trained layer: h and y of order 1."""
    tokens, topk, experts, hidden, inner = shape
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        t = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        return t.mul_(scale)

    probs = torch.rand((tokens, topk), generator=generator, device=device).softmax(dim=1)
    return Inputs(
        shape,
        randn(tokens, hidden).requires_grad_(),
        route(shape, routing, device),
        probs.requires_grad_(),
        randn(experts, 2 * inner, hidden, scale=hidden**-0.5).requires_grad_(),
        randn(experts, hidden, inner, scale=inner**-0.5).requires_grad_(),
        randn(tokens, hidden),
    )
