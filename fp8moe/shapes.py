"""The sizes of expert layers, and those of published models by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one expert layer: H hidden, I intermediate, E experts (local), K per token."""

    hidden: int
    intermediate: int
    experts: int
    topk: int


PRESETS: dict[str, LayerShape] = {
    "deepseek-v3": LayerShape(7168, 2048, 256, 8),
    "deepseek-v2-lite": LayerShape(2048, 1408, 64, 6),
    "mixtral-8x7b": LayerShape(4096, 14336, 8, 2),
    "olmoe-1b-7b": LayerShape(2048, 1024, 64, 8),
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": LayerShape(4096, 1536, 128, 8),
}
"""Expert layers of published models, from their configuration files."""
