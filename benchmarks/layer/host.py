"""What the host spends on a step: time until the call returns, and where it goes."""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Callable

import torch


def host_us(run: Callable[[], object], repeats: int) -> float:
    """Median time in us from calling `run` on an idle GPU to its return; kernels may still run."""
    on_gpu = torch.cuda.is_available()
    times = []
    for _ in range(repeats + 3):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        times.append((time.perf_counter() - start) * 1e6)
        del result
    return statistics.median(times[3:])


def profile(run: Callable[[], object], repeats: int, lines: int = 40) -> str:
    """cProfile's table of `repeats` calls, by own time; the profiler about doubles the times.

    The backward pass runs in the calling thread, so that the profiler sees it.
    """
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        run()
        profiler.enable()
        for _ in range(repeats):
            run()
        profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(lines)
    return text.getvalue()
