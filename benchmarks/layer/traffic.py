"""Which operators a step runs, how long each takes, and the bytes it cannot avoid moving."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS: dict[str, tuple[str, ...]] = {
    "route": ("route_count", "route_place"),
    "cast_permute": ("cast_permute", "permute_scales"),
    "cast_permute_both": ("cast_permute_to_channel",),
    "permute_fp8_to_channel": ("permute_to_channel",),
    "m_grouped_gemm_nt": ("gemm",),
    "m_grouped_gemm_swiglu": ("gemm",),
    "m_grouped_gemm_swiglu_backward": ("gemm",),
    "k_grouped_gemm": ("gemm",),
    "swiglu_cast_both": ("swiglu_cast",),
    **{
        name: (name,)
        for name in (
            "cast_per_token",
            "cast_permute_to_channel",
            "cast_per_block",
            "cast_per_block_both",
            "transpose_per_block",
            "swiglu_cast",
            "swiglu_backward_cast",
            "gather_sum",
            "gather_slots",
        )
    },
}
"""The kernels that each operator of the fused layer launches, in order."""

M_GROUPED = ("m_grouped_gemm_nt", "m_grouped_gemm_swiglu", "m_grouped_gemm_swiglu_backward")
GEMMS = (*M_GROUPED, "k_grouped_gemm")


@dataclass
class Call:
    """One operator call: its label, its unavoidable bytes, its FLOPs, its kernels."""

    label: str
    bytes: int
    flops: float
    kernels: tuple[str, ...]


class _Recorder(TorchDispatchMode):
    """Notes every fp8moe operator. `used` and `slots` are counted by `calls_of`."""

    def __init__(self, capacity: int, used: int, slots: int) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._capacity, self._used, self._slots = capacity, used, slots

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fp8moe":
            self._note(func._schema.name.partition("::")[2], args, result)
        return result

    def _bytes(self, t: torch.Tensor) -> float:
        """Of a buffer with room for the worst case, the part that is used."""
        size = float(t.numel() * t.element_size())
        if self._capacity in t.shape or self._capacity // 128 in t.shape[1:]:
            size *= self._used / self._capacity
        return size

    def _note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name not in KERNELS:
            raise RuntimeError(f"KERNELS: expected an entry for the operator {name}, got none")
        outputs = result if isinstance(result, tuple | list) else (result,)
        tensors = [t for t in (*args, *outputs) if isinstance(t, torch.Tensor)]
        size = sum(self._bytes(t) for t in tensors)
        label, flops = name, 0.0
        if name in ("gather_sum", "gather_slots"):  # padding rows are not read
            rows = args[0]
            size += self._bytes(rows) * (self._slots / self._used - 1)
        if name in M_GROUPED:
            n, k = args[2].shape[1:]
            label, flops = f"{name} N={n} K={k}", 2.0 * self._slots * n * k
        if name == "k_grouped_gemm":
            n, k = args[0].shape[0], args[2].shape[0]
            label, flops = f"{name} {n} x {k}", 2.0 * self._slots * n * k
            if args[-1]:  # accumulate: the output is read too
                size += self._bytes(args[-2])
        self.calls.append(Call(label, round(size), flops, KERNELS[name]))


def calls_of(step: Callable[[], object], ids: torch.Tensor, num_experts: int) -> list[Call]:
    """The operators that one `step()` calls, in order, with their bytes.

    Bytes: each input element read once and each output element written once; of padded buffers only
    the rows of experts, their padding to 128 included.
    """
    from fp8moe.kernels.fp8tensor import padded_capacity

    counts = torch.bincount(ids.flatten(), minlength=num_experts)[:num_experts]
    used = int(((counts + 127) // 128 * 128).sum())
    step()  # cached copies of weights
    recorder = _Recorder(padded_capacity(ids.numel(), num_experts), used, int(counts.sum()))
    # What torch.compile meets under a dispatch mode it would leave uncompiled from then on.
    with torch.compiler.set_stance("force_eager"), recorder:
        step()
    return recorder.calls


@dataclass
class Row:
    """All launches of one operator (or of one kernel that is not ours) in a step."""

    op: str
    launches: int = 0
    time_us: float = 0.0
    bytes: int = 0
    flops: float = 0.0


def kernel_times(step: Callable[[], object], repeats: int) -> tuple[list[tuple[str, float]], float]:
    """(name, median time in us) of each kernel of a step in launch order, and the span in us.

    The span runs from the first kernel's start to the last one's end.
    """
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats + 1):
            step()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [e for e in profile.events() if e.device_type == on_gpu]
    events.sort(key=lambda e: e.time_range.start)
    per_step, rest = divmod(len(events), repeats + 1)
    if rest or not per_step:
        raise RuntimeError(
            f"profile: expected {repeats + 1} equal steps, got {len(events)} kernels"
        )
    # The first step pays for starting the profiler.
    steps = [events[i * per_step : (i + 1) * per_step] for i in range(1, repeats + 1)]
    times = [
        (same[0].name, statistics.median(e.time_range.elapsed_us() for e in same))
        for same in zip(*steps, strict=True)
    ]
    spans = [s[-1].time_range.end - s[0].time_range.start for s in steps]
    return times, statistics.median(spans)


def by_operator(calls: list[Call], times: list[tuple[str, float]]) -> list[Row]:
    """Kernel times added up by operator; kernels that no call explains keep their own name.

    Raises: RuntimeError when a call's kernel did not run.
    """
    rows: dict[str, Row] = {}
    expected = [(call, i) for call in calls for i in range(len(call.kernels))]
    position = 0
    for name, time_us in times:
        op = name
        if position < len(expected):
            call, i = expected[position]
            if name == call.kernels[i]:
                op, position = call.label, position + 1
        row = rows.setdefault(op, Row(op))
        row.launches += 1
        row.time_us += time_us
    if position != len(expected):
        call, i = expected[position]
        raise RuntimeError(
            f"profile: expected {call.kernels[i]} of {call.label} as kernel of ours number "
            f"{position}, got only {[name for name, _ in times]}"
        )
    for call in calls:
        row = rows[call.label]
        row.bytes += call.bytes
        row.flops += call.flops
    return list(rows.values())


def without_times(calls: list[Call]) -> list[Row]:
    """The same table where kernels cannot be timed."""
    return [
        Row(r.op, r.launches, 0.0, r.bytes, r.flops)
        for r in by_operator(calls, [(k, 0.0) for call in calls for k in call.kernels])
    ]
