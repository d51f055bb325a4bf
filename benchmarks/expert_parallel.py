"""Expert-parallel layers over the GPUs of one host or more: time, bytes on the wire, overlap.

    torchrun --nproc-per-node 8 -m benchmarks.expert_parallel --json results/expert_parallel.jsonl
    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel --shapes qwen3 --combine sums
    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel --tiny          # anywhere, over gloo

Every size of expert-parallel group that divides the number of processes is measured, all groups of
a size at the same time, so that all GPUs are busy. A rank has the same number of tokens at each
size and, with uniform routing, its experts get about the same number of rows: weak scaling, with
``efficiency`` = time at ep = 1 / time at ep. Times are medians of the slowest rank, of forward and
backward of a layer whose routing is given and whose FP8 weights are cached. Columns:

    spared SMs    that the weight gradients leave to NCCL while dx travels
    fp8 MB        what a rank sends to others in the two dispatches (x and dy)
    bf16 MB       what that would be in BF16
    combine MB    what it sends in the two combines (y and dx), in BF16
    sizes ms      planning a batch and reading the sizes of its messages on the host
    fp8 ms        the dispatch of x alone: its cast into the message, and the message
    bf16 ms       the same with x in BF16, which is copied into the message
    combine ms    the combine of y alone, with the copies and the sum over k
    wire GB/s     what a rank sends to others in one large all-to-all without any copies
    away GB/s     the same where no rank sends anything to itself
    comm ms       all messages of forward and backward with nothing else running
    comm share    comm ms / ms: the share if nothing were hidden
    hidden        1 - (ms - ms at ep = 1) / comm ms: the part of communication that costs no time
    shared ms     a shared expert alone, forward and backward
    overlap       the part of it that costs no time in a layer whose shared expert's forward runs
                  while the tokens travel
    host ms       until the host has launched a step: near "ms", the device waits for it
    GiB           most memory that was allocated on a GPU

The JSON has the host's time of every part. A row is written when it is measured.

NVLink multicast is left off (NCCL_NVLS_ENABLE=0).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import profile

import fp8moe
from benchmarks import harness
from fp8moe.functional import expert_parallel
from fp8moe.functional.exchange import Exchange, Layout, Message
from fp8moe.functional.expert_parallel import Dispatched
from fp8moe.modules import Experts, SharedExperts


class Shape(NamedTuple):
    tokens: int  # of each rank
    topk: int
    experts: int
    experts_are_per_rank: bool
    hidden: int
    intermediate: int

    def total_experts(self, ep: int) -> int:
        return self.experts * ep if self.experts_are_per_rank else self.experts


SHAPES = {
    "dsv3": Shape(16384, 2, 8, True, 7168, 2048),
    "qwen3": Shape(16384, 8, 128, False, 2048, 768),
    "olmoe": Shape(16384, 8, 64, False, 2048, 1024),
}
"""A slice of DeepSeek-V3 with 8 experts on each rank, Qwen3-30B-A3B and OLMoE-1B-7B."""

TINY = {
    "dsv3": Shape(48, 2, 4, True, 256, 128),
    "qwen3": Shape(48, 4, 8, False, 128, 128),
    "olmoe": Shape(48, 4, 8, False, 128, 256),
}

COLUMNS = [
    "shape", "ep", "combine", "spared SMs", "ms", "efficiency", "fp8 MB", "bf16 MB", "combine MB",
    "sizes ms", "fp8 ms", "bf16 ms", "combine ms", "wire GB/s", "away GB/s", "comm ms",
    "comm share", "hidden", "shared ms", "overlap", "host ms", "GiB",
]  # fmt: skip

WIRE_BYTES = 256 << 20
TIMEOUT = datetime.timedelta(seconds=60)
"""A rank that fails leaves the others waiting: not longer than this."""


class Clock:
    """Times functions that all ranks run together: median over iterations, slowest rank."""

    def __init__(self, device: torch.device, iterations: int) -> None:
        self.device, self.iterations = device, iterations

    def _once(self, fn: Callable[[], object]) -> tuple[float, float]:
        dist.barrier()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        start_s = time.perf_counter()
        fn()
        host_ms = 1e3 * (time.perf_counter() - start_s)
        if self.device.type != "cuda":
            return host_ms, host_ms
        end.record()
        end.synchronize()
        return start.elapsed_time(end), host_ms

    def ms(self, functions: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
        """Milliseconds of each function and until it returned, called in alternation."""
        for fn in functions.values():
            for _ in range(2):
                fn()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
        for _ in range(self.iterations):
            for name, fn in functions.items():
                times[name].append(self._once(fn))
        medians = [
            [statistics.median(t) for t in zip(*both, strict=True)] for both in times.values()
        ]
        slowest = torch.tensor(medians, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return {
            name: (ms, host) for name, (ms, host) in zip(functions, slowest.tolist(), strict=True)
        }


@functools.cache
def groups_of(ep: int) -> dist.ProcessGroup:
    """This rank's group of `ep` neighbours; every rank makes all of them."""
    mine = None
    for first in range(0, dist.get_world_size(), ep):
        members = list(range(first, first + ep))
        group = dist.new_group(members)
        if dist.get_rank() in members:
            mine = group
    assert mine is not None
    return mine


class Layer:
    """One expert layer on this rank, its inputs, and the functions that are timed."""

    def __init__(self, shape: Shape, ep: int, combine: Any, device: torch.device) -> None:
        torch.manual_seed(dist.get_rank())
        self.shape, self.ep, h = shape, ep, shape.hidden
        total = shape.total_experts(ep)
        spread = {"ep_group": groups_of(ep), "combine": combine} if ep > 1 else {}
        options = {"device": device, "dtype": torch.bfloat16}
        self.experts = Experts(total, h, shape.intermediate, **options, **spread)
        self.shared = SharedExperts(h, shape.intermediate, **options)
        scores = torch.rand(shape.tokens, total, device=device)
        self.ids = scores.topk(shape.topk, dim=-1).indices
        self.weights = torch.rand(shape.tokens, shape.topk, device=device).requires_grad_()
        self.x = torch.randn(shape.tokens, h, **options).requires_grad_()
        self.dy = torch.randn(shape.tokens, h, **options)
        self.inputs = [self.x, self.weights, *self.experts.parameters()]
        self.exchange: Exchange | None = None
        if ep > 1:
            tokens: Dispatched = self.experts.dispatch(self.x, self.ids, self.weights)
            tokens.wait()
            self.exchange = tokens.exchange
            self._buffers(self.exchange)

    def _buffers(self, exchange: Exchange) -> None:
        """What the messages carry, made once: their contents do not matter."""
        h = self.shape.hidden
        with torch.no_grad():
            rows = len(exchange.permutation.slot_of_row)
            self.y_rows = torch.zeros(rows, h, dtype=torch.bfloat16, device=self.x.device)
            self.dp = torch.zeros(sum(exchange.slots.of), device=self.x.device)
            size = WIRE_BYTES if self.x.is_cuda else WIRE_BYTES >> 12
            self.wire = torch.zeros(2, size, dtype=torch.uint8, device=self.x.device)

    def step(self) -> None:
        y = self.experts(self.x, self.ids, self.weights)
        torch.autograd.grad(y, self.inputs, self.dy)

    def shared_step(self) -> None:
        torch.autograd.grad(self.shared(self.x), [self.x, *self.shared.parameters()], self.dy)

    def step_with_shared(self) -> None:
        tokens = self.experts.dispatch(self.x, self.ids, self.weights)
        y = self.shared(self.x)
        y = y + self.experts(self.x, self.ids, self.weights, tokens)
        torch.autograd.grad(y, [*self.inputs, *self.shared.parameters()], self.dy)

    def _need(self) -> Exchange:
        assert self.exchange is not None
        return self.exchange

    def sizes(self) -> None:
        exchange = self._need()
        args = self.ids, self.experts.num_experts, exchange.group, exchange.combine
        Exchange.plan(*args).settle()

    def dispatch_fp8(self) -> None:
        self._dispatch(True)

    def dispatch_bf16(self) -> None:
        self._dispatch(None)

    def _dispatch(self, pow2: bool | None) -> None:
        x, weights = self.x.detach(), self.weights.detach()
        Message(self._need(), x, pow2, self.ids, weights).start().wait()

    def combine_bf16(self) -> None:
        self._need().return_rows(self.y_rows).wait()

    def all_to_all(self) -> None:
        dist.all_to_all_single(*self.wire, group=self._need().group)

    def all_to_all_away(self) -> None:
        """As many bytes to each other rank, none to itself."""
        exchange = self._need()
        ranks, me = exchange.group.size(), exchange.group.rank()
        part = self.wire.shape[1] // ranks
        splits = [0 if r == me else part for r in range(ranks)]
        received, sent = self.wire[:, : sum(splits)]
        dist.all_to_all_single(received, sent, splits, splits, group=exchange.group)

    def communication(self) -> None:
        """Every message of forward and backward, the sizes' included, one after the other."""
        exchange = self._need()
        self.sizes()
        self.dispatch_fp8()
        self.combine_bf16()
        Message(exchange, self.dy, True).start().wait()
        exchange.return_slots(self.dp).wait()
        self.combine_bf16()


def wire_bytes(exchange: Exchange, shape: Shape) -> dict[str, float]:
    """MB that this rank sends to other ranks in forward and backward of one layer."""
    me, h = exchange.group.rank(), shape.hidden
    rows = sum(n for r, n in enumerate(exchange.rows.to) if r != me)
    returned = exchange.slots.of if exchange.combine == "rows" else exchange.rows.of
    back = sum(n for r, n in enumerate(returned) if r != me)
    row_bytes = [sum(Layout(h, f, k).row_bytes for k in (shape.topk, 0)) for f in (True, False)]
    return {
        "fp8 MB": rows * row_bytes[0] / 1e6,
        "bf16 MB": rows * row_bytes[1] / 1e6,
        "combine MB": back * 2 * (2 * h) / 1e6,
    }


def measure(
    label: str,
    shape: Shape,
    ep: int,
    combine: str,
    clock: Clock,
    alone_ms: float | None,
    trace: str | None = None,
) -> dict[str, object]:
    """One row of the table.

    Args:
        alone_ms: `ms` at ep = 1, None if this is it.
        trace: folder for rank 0's timeline of a step with the shared expert.
    """
    layer = Layer(shape, ep, combine, clock.device)
    timed = {
        "layer": layer.step,
        "shared": layer.shared_step,
        "both": layer.step_with_shared,
    }
    if layer.exchange is not None:
        timed |= {
            "sizes": layer.sizes,
            "fp8": layer.dispatch_fp8,
            "bf16": layer.dispatch_bf16,
            "combine": layer.combine_bf16,
            "wire": layer.all_to_all,
            "away": layer.all_to_all_away,
            "comm": layer.communication,
        }
    both = clock.ms(timed)
    ms, host = ({name: pair[i] for name, pair in both.items()} for i in range(2))
    row: dict[str, object] = {
        "shape": label, "ep": ep, "combine": combine if ep > 1 else "", "ms": ms["layer"],
        "shared ms": ms["shared"],
        "overlap": (ms["layer"] + ms["shared"] - ms["both"]) / ms["shared"],
        "with shared ms": ms["both"], "host ms": host["layer"],
        **{f"{name} host ms": t for name, t in host.items() if name != "layer"},
        "sizes": {**shape._asdict(), "experts": layer.experts.num_experts},
    }  # fmt: skip
    if ep > 1:
        row["spared SMs"] = expert_parallel.SPARED_SMS
    if trace is not None:
        name = "-".join(
            str(row[key]) for key in ("shape", "ep", "combine", "spared SMs") if key in row
        )
        write_timeline(Path(trace) / f"{name}.json.gz", layer.step_with_shared)
    if clock.device.type == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if alone_ms is not None:
        row["efficiency"] = alone_ms / ms["layer"]
    if layer.exchange is not None:
        row |= wire_bytes(layer.exchange, shape)
        row |= {f"{name} ms": ms[name] for name in ("sizes", "fp8", "bf16", "combine", "comm")}
        sent = layer.wire[0].numel() // ep * (ep - 1)
        row |= {f"{name} GB/s": sent / ms[name] / 1e6 for name in ("wire", "away")}
        row["comm share"] = ms["comm"] / ms["layer"]
        if alone_ms is not None:
            row["hidden"] = 1 - (ms["layer"] - alone_ms) / ms["comm"]
    return row


def write_timeline(path: Path, step: Callable[[], None]) -> None:
    """A trace of a step on rank 0, for chrome://tracing or Perfetto; the first one warms up."""
    for _ in range(2):
        with profile() as profiler:
            step()
            dist.barrier()
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))


def ep_sizes(world: int, wanted: list[int] | None) -> list[int]:
    """Sizes of expert-parallel groups to measure: powers of two that divide the world.

    Raises: SystemExit for a wanted size that does not divide it.
    """
    if wanted is None:
        return [n for n in (1 << i for i in range(world.bit_length())) if world % n == 0]
    for n in wanted:
        if n < 1 or world % n:
            raise SystemExit(f"--ep: expected divisors of the {world} processes, got {n}")
    return sorted(set(wanted))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m benchmarks.expert_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["dsv3", "qwen3"])
    top.add_argument("--ep", nargs="+", type=int, help="sizes of the group; default: all that fit")
    top.add_argument("--combine", nargs="+", choices=["rows", "sums"], default=["rows", "sums"])
    top.add_argument("--iterations", type=int, default=20)
    top.add_argument("--tiny", action="store_true", help="small sizes: shows that it runs, no more")
    top.add_argument(
        "--spare-sms",
        nargs="+",
        type=int,
        default=[expert_parallel.SPARED_SMS],
        metavar="N",
        help="SMs that the weight gradients leave to NCCL while dx travels; several are compared",
    )
    top.add_argument("--trace", metavar="FOLDER", help="write a timeline of one step of each row")
    top.add_argument("--json", metavar="FILE", help="append one JSON object per row")
    return top


def main() -> None:
    args = parser().parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("expected to be started by torchrun: see --help")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    world = dist.get_world_size()
    clock = Clock(device, args.iterations)
    for label in args.shapes:
        shape = (TINY if args.tiny else SHAPES)[label]
        rows: list[dict[str, object]] = []
        alone_ms: float | None = None
        for ep in ep_sizes(world, args.ep):
            variants = list(itertools.product(args.combine, args.spare_sms))
            for combine, spared in variants if ep > 1 else variants[:1]:
                expert_parallel.SPARED_SMS = spared
                row = measure(label, shape, ep, combine, clock, alone_ms, args.trace)
                rows.append({**row, "world": world})
                if dist.get_rank() == 0:
                    harness.append_json(args.json, rows[-1:])
                if ep == 1:
                    alone_ms = float(str(row["ms"]))
                fp8moe.clear_weight_cache()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
        if dist.get_rank() == 0:
            print(harness.table(rows, COLUMNS), end="\n\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
