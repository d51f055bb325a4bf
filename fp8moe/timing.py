"""Timers of kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_L2_FLUSH_BYTES = 256 << 20
_SPIN_CYCLES_PER_US = 2000


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("kernel timers: expected a CUDA GPU, found none")


def time_kernel_us(
    fn: Callable[[], object], *, flush_l2: bool = True, iters: int = 20, warmup: int = 3
) -> float:
    """Median GPU time of one call of `fn`, in microseconds, between two events on the stream.

    Args:
        fn: launches work on the current stream.
        flush_l2: read 256 MiB before each call, so that inputs come from DRAM and no line is left
            to be written back.
        iters: calls timed. warmup: calls before them.

    The GPU spins before the first event for longer than the host needs to launch `fn`: the time is
    that of the kernels, not of Python.

    Raises:
        RuntimeError: no CUDA GPU.
    """
    _need_cuda()
    for _ in range(max(1, warmup)):
        fn()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    fn()
    host_us = (time.perf_counter() - begin) * 1e6
    spin = int((2 * host_us + 20) * _SPIN_CYCLES_PER_US)
    foreign = torch.zeros(_L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    pairs = []
    for _ in range(iters):
        if flush_l2:
            foreign.amax()
        torch.cuda._sleep(spin)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1e3 for start, end in pairs)
    return times[len(times) // 2]


def sustained_us(fn: Callable[[], object], *, seconds: float = 1.0) -> float:
    """Mean time of one call of `fn`, in microseconds, back to back on a card that is hot.

    Args:
        fn: launches work on the current stream.
        seconds: time spent heating and again measuring.

    Raises:
        RuntimeError: no CUDA GPU.
    """
    _need_cuda()
    fn()
    once_us = max(1.0, time_kernel_us(fn, flush_l2=False, iters=5))
    calls = max(1, int(seconds * 1e6 / once_us))
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    for _ in range(calls):
        fn()
    start.record()
    for _ in range(calls):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / calls
