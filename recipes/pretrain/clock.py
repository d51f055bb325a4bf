"""Time and memory of steps, measured without making the device wait."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepMeter:
    """Collects the duration of steps and the memory they need until ``read``.

    On a GPU durations come from events, which cost no synchronisation, and the memory of a step is
    what the model keeps plus what the step adds at its peak, so that each of two interleaved models
    gets its own figure. On a CPU the memory is that of the whole process.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: list[Any] = []
        self._memory = 0

    @contextmanager
    def step(self, kept_bytes: int, timed: bool = True) -> Iterator[None]:
        """Measures the block; its duration counts if ``timed``.

        Args:
            kept_bytes: what the model holds on the device when the block begins.
        """
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            added = torch.cuda.max_memory_allocated(self.device) - before
            self._memory = max(self._memory, kept_bytes + added)
            span: Any = (start, end)
        else:
            begin = time.perf_counter()
            yield
            span = time.perf_counter() - begin
            self._memory = max(self._memory, resident_bytes())
        if timed:
            self._spans.append(span)

    def read(self) -> tuple[float, int] | None:
        """(mean step_ms, largest memory_bytes) since the last read; None if no step was timed.

        On a GPU this waits for the last step.
        """
        if not self._spans:
            return None
        if self.device.type == "cuda":
            self._spans[-1][1].synchronize()
            durations = [start.elapsed_time(end) for start, end in self._spans]
        else:
            durations = [1e3 * span for span in self._spans]
        result = sum(durations) / len(durations), self._memory
        self._spans.clear()
        self._memory = 0
        return result


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:  # no /proc: the largest it ever was, in KiB on Linux and in bytes on macOS
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
