"""What every benchmark shares: the machine's description, JSON lines, interleaved kernel timing.

``--json FILE`` appends one object per row, each with the GPU, its clocks and the versions, so that
figures from different days can be told apart.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import fp8moe

FLUSH_BYTES = 256 << 20  # several times the L2 of an H100 (50 MB) or H200 (60 MB)
COPY_BYTES = 1 << 30
COOL_BYTES = 8 << 30  # read in about 3 ms
_SPIN_CYCLES = 300_000
_LONGEST = 60  # characters of a cell of a table


def machine() -> dict[str, object]:
    """GPU, driver, clocks (MHz), power (W) and versions."""
    versions: dict[str, object] = {"torch": torch.__version__, "fp8moe": fp8moe.__version__}
    if not torch.cuda.is_available():
        return {"gpu": "none", **versions}
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        line = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.splitlines()[0]
        smi = dict(zip(query.split(","), (v.strip() for v in line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        smi = {"nvidia-smi": f"not available: {error}"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **versions,
        **smi,
    }


def append_json(path: str | None, rows: list[dict[str, object]]) -> None:
    """Append each row, with the date and the machine, as one JSON line; one write for all."""
    if path is None or not rows:
        return
    about = {"date": datetime.date.today().isoformat(), **machine()}
    text = "".join(json.dumps({**row, **about}) + "\n" for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(text)


def time_interleaved(
    functions: dict[str, Callable[[], object]], iterations: int = 20
) -> dict[str, float]:
    """Median time in us of each function, in alternation, from an L2 full of clean foreign data.

    The flush reads: lines that it left to be written back would be charged to the function.
    Interleaving gives every contender the same clocks and temperature. The GPU spins before the
    first event for longer than the host takes to launch, so host time does not count.
    """
    foreign = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    for fn in functions.values():
        for _ in range(2):
            fn()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in functions}
    for _ in range(iterations):
        for name, fn in functions.items():
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            foreign.amax()
            torch.cuda._sleep(_SPIN_CYCLES)
            start.record()
            fn()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(s.elapsed_time(e) * 1e3 for s, e in pairs)
        for name, pairs in events.items()
    }


class KernelRecord(NamedTuple):
    """One kernel of a profile, times in us."""

    start: float
    name: str
    duration: float


def _profile(run: Callable[[], object]) -> list[KernelRecord]:
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    return sorted(
        KernelRecord(e.time_range.start, e.name, e.device_time)
        for e in prof.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )


def between_flushes(records: list[KernelRecord], flush: set[str]) -> list[float]:
    """Kernel time in us after each flush and before the next; consecutive flush kernels are one."""
    sums: list[float] = []
    flushing = False
    for record in records:
        if record.name in flush:
            if not flushing:
                sums.append(0.0)
        elif sums:
            sums[-1] += record.duration
        flushing = record.name in flush
    return sums


def time_kernels(
    functions: dict[str, Callable[[], object]], iterations: int = 20
) -> dict[str, float]:
    """Median kernel time in us of each function, in alternation, from an L2 full of foreign data.

    The sum of the durations of the function's kernels as CUPTI records them: without launch
    latency, which events include (about 3 us). The flush reads 8 GiB, so that the card is as cool
    before a long kernel as before a short one.
    """
    foreign = torch.zeros(COOL_BYTES // 8, dtype=torch.int64, device="cuda")
    for fn in functions.values():
        for _ in range(2):
            fn()
    foreign.amax()
    torch.cuda.synchronize()
    flush = {record.name for record in _profile(foreign.amax)}

    def run() -> None:
        for _ in range(iterations):
            for fn in functions.values():
                foreign.amax()
                fn()

    sums = between_flushes(_profile(run), flush)
    if len(sums) != iterations * len(functions):
        raise RuntimeError(
            f"time_kernels: expected {iterations * len(functions)} flushes in the profile, "
            f"got {len(sums)}; a function launches a kernel named like the flush's"
        )
    return {name: statistics.median(sums[i :: len(functions)]) for i, name in enumerate(functions)}


def time_sustained(fn: Callable[[], object], seconds: float = 0.25) -> float:
    """Mean time in us of back-to-back launches on a card that has been kept busy as long before."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    fn()
    start.record()
    fn()
    end.record()
    torch.cuda.synchronize()
    count = max(5, int(seconds * 1e3 / max(start.elapsed_time(end), 1e-3)))
    for _ in range(count):
        fn()
    start.record()
    for _ in range(count):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / count


def time_back_to_back(
    functions: dict[str, Callable[[], object]], rounds: int, calls: int
) -> dict[str, float]:
    """Median wall-clock time in us of one call among `calls` back to back, rounds in alternation.

    What a training loop sees: launch overhead counts where the host is slower than the GPU. Works
    on a CPU too.
    """
    on_gpu = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, fn in functions.items():
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                fn()
            if on_gpu:
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                times[name].append((time.perf_counter() - start) * 1e6 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def host_time(fn: Callable[[], object], calls: int = 200) -> float:
    """Median host time in us of a call, with the GPU never more than one call behind."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def copy_rate() -> float:
    """Copy bandwidth of torch on this GPU, bytes read and written per us, from 1 GiB."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / time_interleaved({"copy": lambda: target.copy_(source)}, 10)["copy"]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def table(rows: list[dict[str, object]], columns: list[str]) -> str:
    """Rows as aligned text; what is longer than _LONGEST (names of foreign kernels) is cut."""
    cells = [columns] + [
        [f"{v:.3g}" if isinstance(v := row.get(c, ""), float) else _cut(str(v)) for c in columns]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in cells
    )
