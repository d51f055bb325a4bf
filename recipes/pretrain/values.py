"""How many FP8 values a model's casts lose: flushed to zero, or at the largest value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import fp8moe

_MAGNITUDE = 0x7F  # all bits of an e4m3 code but the sign
_LARGEST = 0x7E  # 448, the largest finite magnitude


class ValueCounter:
    """Counts codes per tensor kind on the device; the host reads them once, in ``shares``.

    A zero code stands for a value below half the smallest subnormal of its block, or for an exact
    zero, which real activations, gradients and weights hardly ever hold.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        self._total: dict[str, int] = {}

    def _see(self, kind: str, t: fp8moe.FP8Tensor) -> None:
        magnitude = t.data.view(torch.uint8) & _MAGNITUDE
        seen = torch.stack([(magnitude == 0).sum(), (magnitude == _LARGEST).sum()])
        self._counts[kind] = self._counts[kind] + seen if kind in self._counts else seen
        self._total[kind] = self._total.get(kind, 0) + magnitude.numel()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts every FP8 operand that expert layers make inside the block."""
        with fp8moe.observe_fp8(self._see):
            yield

    def shares(self) -> dict[str, dict[str, float]]:
        """{kind: {"flushed": share, "saturated": share}}, and starts counting anew."""
        found = {}
        for kind, counts in self._counts.items():
            flushed, saturated = counts.tolist()
            total = max(1, self._total[kind])
            found[kind] = {"flushed": flushed / total, "saturated": saturated / total}
        self._counts.clear()
        self._total.clear()
        return found
