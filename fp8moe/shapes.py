"""The sizes of expert layers, and those of published models by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one expert layer: H hidden, I intermediate, E experts (local), K per token.

    Raises: ValueError naming a size that the kernels cannot take.
    """

    hidden: int
    intermediate: int
    experts: int
    topk: int

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            if size < 1 or size % 16:
                raise ValueError(f"{name}: expected a positive multiple of 16, got {size}")
        if not 1 <= self.experts <= 1024:
            raise ValueError(f"experts: expected 1 to 1024, got {self.experts}")
        if self.topk < 1:
            raise ValueError(f"topk: expected at least 1, got {self.topk}")


PRESETS: dict[str, LayerShape] = {
    "deepseek-v3": LayerShape(7168, 2048, 256, 8),
    "deepseek-v2-lite": LayerShape(2048, 1408, 64, 6),
    "mixtral-8x7b": LayerShape(4096, 14336, 8, 2),
    "olmoe-1b-7b": LayerShape(2048, 1024, 64, 8),
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": LayerShape(4096, 1536, 128, 8),
}
"""Expert layers of published models, from their configuration files."""
