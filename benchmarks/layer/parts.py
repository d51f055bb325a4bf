"""The parts of the benchmark: each measures one shape and returns rows of figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness
from benchmarks.layer import traffic
from benchmarks.layer.contenders import BASELINE, CONTENDERS, FP8MOE, Layer, forward, step
from benchmarks.layer.host import host_us
from benchmarks.layer.memory import peak_bytes, saved_bytes
from benchmarks.layer.workload import ROUTINGS, Inputs, Shape, make_inputs
from fp8moe import quant

GIB = float(1 << 30)
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Effort:
    """How often things are timed."""

    rounds: int
    calls: int
    kernel_repeats: int


QUICK, FULL = Effort(5, 3, 5), Effort(20, 5, 20)


def capture(layer: Layer, inputs: Inputs) -> Callable[[], object]:
    """A step as a CUDA graph, which launches with no host work; weights are cast inside it.

    On leaves of its own: autograd remembers the stream on which a leaf was first used.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = step(layer, inputs.with_fresh_leaves())
        for _ in range(3):
            run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> object:
        graph.replay()
        return results

    return replay


def _ratio(times: dict[str, float], name: str) -> dict[str, float]:
    return {"x baseline": times[BASELINE] / times[name]} if BASELINE in times else {}


def time_part(shape: Shape, layers: dict[str, Layer], effort: Effort, device: torch.device) -> Rows:
    """Forward, forward + backward, the same from a CUDA graph, memory; against the baseline."""
    inputs = make_inputs(shape, device)
    steps = {name: step(layer, inputs) for name, layer in layers.items()}
    forwards = {name: forward(layer, inputs) for name, layer in layers.items()}
    on_gpu = device.type == "cuda"
    saved = {name: saved_bytes(forwards[name]) for name in layers}
    peak = {name: peak_bytes(steps[name]) for name in layers} if on_gpu else {}
    whole = harness.time_back_to_back(steps, effort.rounds, effort.calls)
    first = harness.time_back_to_back(forwards, effort.rounds, effort.calls)
    replays: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    for name, layer in layers.items() if on_gpu else ():
        try:
            replays[name] = capture(layer, inputs)
        except RuntimeError as error:  # what a layer does that a graph cannot hold
            refused[name] = f"not capturable: {str(error).splitlines()[0]}"
    replayed = harness.time_back_to_back(replays, effort.rounds, effort.calls)
    rows: Rows = []
    for name in layers:
        row: dict[str, Any] = {
            "layer": name,
            "fwd ms": first[name] / 1e3,
            "fwd+bwd ms": whole[name] / 1e3,
            **_ratio(whole, name),
            "TFLOP/s": inputs.flops / whole[name] / 1e6,
            "saved GiB": saved[name] / GIB,
        }
        if on_gpu:
            row["peak GiB"] = peak[name] / GIB
            row["graph ms"] = replayed[name] / 1e3 if name in replayed else refused[name]
        rows.append(row)
    return rows


def kernels_part(
    shape: Shape, layers: dict[str, Layer], effort: Effort, device: torch.device
) -> Rows:
    """Time by kernel, and for ours the share of copy bandwidth or the rate of the GEMM."""
    inputs = make_inputs(shape, device)
    on_gpu = device.type == "cuda"
    copy = harness.copy_rate() if on_gpu else 0.0
    rows: Rows = []
    for name, layer in layers.items():
        run = step(layer, inputs)
        calls = traffic.calls_of(run, inputs.ids, shape.experts)
        if on_gpu:
            times, span = traffic.kernel_times(run, effort.kernel_repeats)
            operators = traffic.by_operator(calls, times)
            idle = span - sum(r.time_us for r in operators)
            operators.append(traffic.Row("between kernels", 0, idle))
        else:
            operators = traffic.without_times(calls)
        for r in operators:
            row: dict[str, Any] = {"layer": name, "op": r.op, "launches": r.launches}
            if r.bytes:
                row["MB"] = r.bytes / 1e6
            if on_gpu:
                row["us"] = r.time_us
                if r.flops:
                    row["TFLOP/s"] = r.flops / r.time_us / 1e6
                elif r.bytes:
                    row["% of copy"] = 100 * r.bytes / r.time_us / copy
            rows.append(row)
        if on_gpu and calls:
            rows += [{"layer": name, **row} for row in _together(operators, copy)]
    return rows


def _together(operators: list[traffic.Row], copy: float) -> Rows:
    """The sums of a step: its GEMMs' rate, and of our other kernels the share of `copy`."""
    gemms = [r for r in operators if r.flops]
    others = [r for r in operators if r.bytes and not r.flops]
    gemm_us, other_us = (sum(r.time_us for r in kind) for kind in (gemms, others))
    moved = sum(r.bytes for r in others)
    return [
        {
            "op": "our GEMMs",
            "launches": sum(r.launches for r in gemms),
            "sum us": gemm_us,
            "TFLOP/s": sum(r.flops for r in gemms) / gemm_us / 1e6,
        },
        {
            "op": "our others",
            "launches": sum(r.launches for r in others),
            "MB": moved / 1e6,
            "sum us": other_us,
            "% of copy": 100 * moved / other_us / copy,
        },
    ]


def weights_part(shape: Shape, effort: Effort, device: torch.device) -> Rows:
    """The FP8 copies of both weights, made once per optimizer step."""
    inputs = make_inputs(shape, device)

    def update() -> list[object]:
        return [quant.per_block_both(w, pow2=True) for w in (inputs.w13, inputs.w2)]

    moved = sum(
        t.numel() * t.element_size()
        for w, (row, transposed) in zip((inputs.w13, inputs.w2), update(), strict=True)
        for t in (w, *row, *transposed)
    )
    rows: Rows = [{"op": "cast w13 and w2, both orientations", "MB": moved / 1e6}]
    if device.type == "cuda":
        us = harness.time_interleaved({"update": update}, effort.rounds)["update"]
        rows[0] |= {"us": us, "% of copy": 100 * moved / us / harness.copy_rate()}
    return rows


def skew_part(shape: Shape, layers: dict[str, Layer], effort: Effort, device: torch.device) -> Rows:
    """Forward + backward under each routing, relative to balanced routing of the same layer."""
    name = next(n for n in (*layers, *FP8MOE) if n in FP8MOE)
    compared = {n: CONTENDERS[n] for n in (name, BASELINE)}
    every = {}
    for routing in ROUTINGS:
        if routing == "empty" and shape.experts < 2 * shape.topk:
            continue
        inputs = make_inputs(shape, device, routing)
        every |= {(n, routing): step(layer, inputs) for n, layer in compared.items()}
    keyed = {f"{n}, {routing}": run for (n, routing), run in every.items()}
    times = harness.time_back_to_back(keyed, effort.rounds, effort.calls)
    return [
        {
            "layer": n,
            "routing": routing,
            "fwd+bwd ms": times[f"{n}, {routing}"] / 1e3,
            "x balanced": times[f"{n}, {routing}"] / times[f"{n}, balanced"],
        }
        for n, routing in every
    ]


def small_part(
    shape: Shape, layers: dict[str, Layer], effort: Effort, device: torch.device
) -> Rows:
    """512 tokens, where launches count."""
    return time_part(shape._replace(tokens=min(shape.tokens, 512)), layers, effort, device)


def host_part(shape: Shape, layers: dict[str, Layer], effort: Effort, device: torch.device) -> Rows:
    """Time of the host alone; the size of the layer hardly matters to it."""
    inputs = make_inputs(shape._replace(tokens=min(shape.tokens, 512)), device)
    rows: Rows = []
    for name, layer in layers.items():
        run, first = step(layer, inputs), forward(layer, inputs)
        row: dict[str, Any] = {
            "layer": name,
            "fwd host us": host_us(first, 2 * effort.rounds),
            "fwd+bwd host us": host_us(run, 2 * effort.rounds),
        }
        if device.type == "cuda":
            launches = len(traffic.kernel_times(run, 2)[0])
            row |= {"kernels": launches, "us a kernel": row["fwd+bwd host us"] / launches}
        rows.append(row)
    return rows
