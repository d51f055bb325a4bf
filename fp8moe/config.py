"""FP8Config: which GEMMs run in FP8, how scales are formed, and what is kept for backward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp8", "bf16"]
Save = Literal["bf16", "fp8", "recompute"]

_CHOICES: dict[str, tuple[object, ...]] = {
    "fprop": ("fp8", "bf16"),
    "dgrad": ("fp8", "bf16"),
    "wgrad": ("fp8", "bf16"),
    "pow2_scales": (True, False),
    "pow2_weight_scales": (True, False),
    "save": ("bf16", "fp8", "recompute"),
    "cache_weights": (True, False),
}


@dataclass(frozen=True)
class FP8Config:
    """fprop, dgrad, wgrad: y = x w^T, dx = dy w and dw = dy^T x, each in FP8 or BF16.

    Args:
        fprop, dgrad, wgrad: "fp8" or "bf16", each GEMM for itself. When all three are "fp8" the
            expert layer takes its fused path (see fp8moe.functional).
        pow2_scales: scales of activations and gradients are rounded up to powers of two. Costs
            0.3 dB on Gaussian data and makes the row-to-column conversion that wgrad needs exact
            but for underflow; with False that conversion rounds twice (-2.7 dB).
        pow2_weight_scales: likewise for the 128 x 128 scales of weights, which transpose exactly
            either way.
        save: what the expert layer keeps of its hidden activation h = x w13^T for backward.
            "bf16": h itself. "fp8": h in FP8, half the bytes, about 1 dB on the gradients.
            "recompute": nothing; backward runs that GEMM again, with bit-equal results. All three
            refer to the caller's x, which must not change before backward (autograd raises if it
            was changed in place).
        cache_weights: keep the FP8 copies of a weight, and their transposes, until it changes:
            2 bytes a parameter, one cast per optimizer step instead of one per micro-batch. False:
            cast in every forward and again in backward, and hold nothing in between (for weights
            that live only while a layer runs, such as FSDP's). A write through `w.data` outside of
            an optimizer step is not seen: call `fp8moe.clear_weight_cache()` after it.

    Raises: ValueError naming the field, for a value it cannot have.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
    """

    fprop: Precision = "fp8"
    dgrad: Precision = "fp8"
    wgrad: Precision = "fp8"
    pow2_scales: bool = True
    pow2_weight_scales: bool = True
    save: Save = "bf16"
    cache_weights: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            # By identity of type too: 1 == True, but 1 is a mistake here.
            if not any(value == choice and type(value) is type(choice) for choice in choices):
                listed = " or ".join(repr(choice) for choice in choices)
                raise ValueError(f"FP8Config.{name}: expected {listed}, got {value!r}")

    @classmethod
    def bf16(cls, *, save: Save = "bf16", cache_weights: bool = True) -> FP8Config:
        """All three GEMMs in BF16: the twin to compare FP8 with."""
        return cls("bf16", "bf16", "bf16", save=save, cache_weights=cache_weights)

    def replace(self, **changes: object) -> FP8Config:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def all_fp8(self) -> bool:
        return self.fprop == self.dgrad == self.wgrad == "fp8"

    @property
    def any_fp8(self) -> bool:
        return "fp8" in (self.fprop, self.dgrad, self.wgrad)
