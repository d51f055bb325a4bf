"""Which share of a step is spent inside the experts, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import fp8moe

from .data import Batch
from .twin import Twin

_REPEATS = 3


class _Stopwatch:
    """Sums the time between ``start`` and ``stop``, on the device's clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[Any, Any]] = []
        self._open: Any = None

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, *_: Any) -> None:
        self._open = self._now()

    def stop(self, *_: Any) -> None:
        self._marks.append((self._open, self._now()))

    def total_ms(self) -> float:
        if self.device.type != "cuda":
            return 1e3 * sum(end - begin for begin, end in self._marks)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in self._marks)


def expert_share(twin: Twin, batches: Iterable[Batch]) -> float:
    """Time inside ``fp8moe.Experts`` over the time of forward and backward.

    Runs a few passes with hooks around the experts and throws the gradients away; the model stays
    as it is. The optimizer's step is not part of either time. On a GPU that waits for its host
    inside a hooked span the waiting counts too.
    """
    whole, inside = _Stopwatch(twin.device), _Stopwatch(twin.device)
    experts = [m for m in twin.model.modules() if isinstance(m, fp8moe.Experts)]
    batch = next(iter(batches))
    _pass(twin, batch)
    handles = []
    for module in experts:
        handles += _hook(module, inside)
    try:
        for _ in range(_REPEATS):
            fp8moe.clear_weight_cache()
            whole.start()
            _pass(twin, batch)
            whole.stop()
    finally:
        for handle in handles:
            handle.remove()
        fp8moe.clear_weight_cache()
    return inside.total_ms() / whole.total_ms()


def _hook(module: nn.Module, watch: _Stopwatch) -> list[Any]:
    return [
        module.register_forward_pre_hook(watch.start),
        module.register_forward_hook(watch.stop),
        module.register_full_backward_pre_hook(watch.start),
        module.register_full_backward_hook(watch.stop),
    ]


def _pass(twin: Twin, batch: Batch) -> None:
    with twin.autocast():
        loss, balance = twin.model(batch.tokens, batch.targets)
    (loss + balance).backward()
    twin.model.zero_grad(set_to_none=True)
