"""Speed of every memory-bound kernel, as a share of the copy bandwidth measured in the same run.

    python -m benchmarks.memory
    python -m benchmarks.memory --shapes qwen3 --ops permute swiglu --json results/memory.jsonl

``bytes`` is what a kernel cannot avoid: each input element read once (a token's row once, however
many experts it goes to), each output element written once, padding inside groups included. Before
every launch L2 is filled with data that is not modified: lines left to be written back would be
charged to the kernel under test. ``copy`` is ``torch`` copying 1 GiB, read and write counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import harness
from fp8moe.kernels import cast, cast_permute, permute, swiglu


class Shape(NamedTuple):
    tokens: int
    topk: int
    experts: int
    hidden: int
    intermediate: int


SHAPES = {
    "dsv3": Shape(16384, 2, 8, 7168, 2048),
    "qwen3": Shape(16384, 8, 128, 2048, 768),
    "olmoe": Shape(16384, 8, 64, 2048, 1024),
}
"""A slice of DeepSeek-V3 (8 local experts), Qwen3-30B-A3B and OLMoE-1B-7B."""


class Case(NamedTuple):
    name: str
    run: Callable[[], object]
    bytes: int


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def used(tensor: torch.Tensor, rows: int, dim: int = 0) -> int:
    """Bytes of the first `rows` along `dim`: of a buffer sized for the worst case, what is used."""
    return nbytes(tensor) // tensor.shape[dim] * rows


def random(*size: int) -> torch.Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def cast_cases(shape: Shape) -> list[Case]:
    x = random(shape.tokens, shape.hidden)
    w = random(shape.experts, 2 * shape.intermediate, shape.hidden)
    rows = shape.tokens * shape.topk
    grouped = random(rows, shape.hidden)
    # Ends that are no multiples of 128: every group has padding.
    ends = torch.arange(1, shape.experts + 1, device="cuda") * rows // shape.experts - 37
    ends[-1] = rows
    ends = ends.int()
    sizes = ends.diff(prepend=ends.new_zeros(1))
    padded = int(((sizes + 127) // 128 * 128).sum())
    row_out = cast.cast_per_token(x, True)
    block_out = cast.cast_per_block(w, True)
    channel_out = cast.cast_per_channel(grouped, ends, True, False)
    channel_bytes = used(channel_out[0], padded, 1) + used(channel_out[1], padded // 128, 1)
    block_bytes = padded * shape.hidden + padded // 128 * (shape.hidden // 128) * 4
    return [
        Case(
            f"cast_per_token {tuple(x.shape)}",
            lambda: cast.cast_per_token(x, True),
            nbytes(x, *row_out),
        ),
        Case(
            f"cast_per_block {tuple(w.shape)}",
            lambda: cast.cast_per_block(w, True),
            nbytes(w, *block_out),
        ),
        Case(
            f"cast_per_block_both {tuple(w.shape)}",
            lambda: cast.cast_per_block_both(w, True),
            nbytes(w, *block_out, *block_out),
        ),
        Case(
            f"transpose_per_block {tuple(w.shape)}",
            lambda: cast.transpose_per_block(*block_out),
            nbytes(*block_out, *block_out),
        ),
        Case(
            f"cast_per_channel {tuple(grouped.shape)}",
            lambda: cast.cast_per_channel(grouped, ends, True, False),
            nbytes(grouped, ends) + channel_bytes,
        ),
        Case(
            f"cast_per_channel blocks {tuple(grouped.shape)}",
            lambda: cast.cast_per_channel(grouped, ends, True, True),
            nbytes(grouped, ends) + block_bytes,
        ),
    ]


def layer_cases(shape: Shape) -> list[Case]:
    """Routing, permutation and SwiGLU of one expert layer with uniform routing."""
    tokens, topk, experts, hidden, intermediate = shape
    scores = torch.rand(tokens, experts, device="cuda")
    ids = scores.topk(topk, dim=-1).indices
    weights = torch.rand(tokens, topk, device="cuda")
    maps = permute.route(ids, experts)
    row_of_slot, slot_of_row, group_ends, _ = maps
    rows = int(group_ends[-1])  # padding inside the groups included
    slots = tokens * topk

    x = random(tokens, hidden)
    x8 = cast.cast_per_token(x, True)
    h, da = random(len(slot_of_row), 2 * intermediate), random(len(slot_of_row), intermediate)
    h8 = swiglu.swiglu_cast_both(h, weights, slot_of_row, True)[2:]
    y = random(len(slot_of_row), hidden)
    partials = torch.rand(intermediate // 128, len(slot_of_row), device="cuda")
    row_map = used(slot_of_row, rows)
    fp8_rows = rows * hidden + rows * hidden // 128 * 4
    fp8_blocks = rows * hidden + rows // 128 * (hidden // 128) * 4

    def activation_bytes(columns: int) -> int:
        return rows * columns + rows * columns // 128 * 4

    swiglu_in = used(h, rows) + row_map + nbytes(weights)
    aw_t_bytes = rows * intermediate + rows // 128 * intermediate // 128 * 4
    backward_out = 2 * activation_bytes(2 * intermediate) + aw_t_bytes
    return [
        Case("route", lambda: permute.route(ids, experts), nbytes(ids, *maps)),
        Case(
            "permute_rows",
            lambda: permute.permute_rows(x, row_of_slot, slot_of_row),
            nbytes(x) + row_map + 2 * rows * hidden,
        ),
        Case(
            "permute_fp8",
            lambda: permute.permute_fp8(*x8, row_of_slot, slot_of_row),
            nbytes(*x8) + row_map + fp8_rows,
        ),
        Case(
            "permute_fp8_to_channel",
            lambda: permute.permute_fp8_to_channel(*x8, slot_of_row, topk, True, False),
            nbytes(*x8) + row_map + fp8_rows,
        ),
        Case(
            "permute_fp8_to_channel blocks",
            lambda: permute.permute_fp8_to_channel(*x8, slot_of_row, topk, True, True),
            nbytes(*x8) + row_map + fp8_blocks,
        ),
        Case(
            "permute_fp8_both",
            lambda: permute.permute_fp8_both(*x8, slot_of_row, topk, True),
            nbytes(*x8) + row_map + 2 * fp8_rows,
        ),
        Case(
            "cast_permute",
            lambda: cast_permute.cast_permute(x, row_of_slot, slot_of_row, True),
            nbytes(x, row_of_slot) + fp8_rows,
        ),
        Case(
            "cast_permute_to_channel",
            lambda: cast_permute.cast_permute_to_channel(x, slot_of_row, topk, True, False),
            nbytes(x) + row_map + fp8_rows,
        ),
        Case(
            "cast_permute_to_channel blocks",
            lambda: cast_permute.cast_permute_to_channel(x, slot_of_row, topk, True, True),
            nbytes(x) + row_map + fp8_blocks,
        ),
        Case(
            "cast_permute_both",
            lambda: cast_permute.cast_permute_both(x, slot_of_row, topk, True),
            nbytes(x) + row_map + 2 * fp8_rows,
        ),
        Case(
            "gather_sum",
            lambda: permute.gather_sum(y, row_of_slot),
            slots * hidden * 2 + nbytes(x, row_of_slot),
        ),
        Case(
            "gather_slots",
            lambda: permute.gather_slots(partials, row_of_slot),
            slots * len(partials) * 4 + nbytes(row_of_slot, weights),
        ),
        Case(
            "swiglu_cast",
            lambda: swiglu.swiglu_cast(h, weights, slot_of_row, True),
            swiglu_in + activation_bytes(intermediate),
        ),
        Case(
            "swiglu_cast_both",
            lambda: swiglu.swiglu_cast_both(h, weights, slot_of_row, True),
            swiglu_in + activation_bytes(intermediate) + activation_bytes(2 * intermediate),
        ),
        Case(
            "swiglu_backward_cast",
            lambda: swiglu.swiglu_backward_cast(h, None, da, weights, slot_of_row, True),
            swiglu_in + used(da, rows) + backward_out + used(partials, rows, 1),
        ),
        Case(
            "swiglu_backward_cast of h in FP8",
            lambda: swiglu.swiglu_backward_cast(*h8, da, weights, slot_of_row, True),
            activation_bytes(2 * intermediate)
            + row_map
            + nbytes(weights)
            + used(da, rows)
            + backward_out
            + used(partials, rows, 1),
        ),
    ]


def measure(label: str, cases: list[Case], iterations: int) -> list[dict[str, object]]:
    """Time all cases and a copy in alternation."""
    source = torch.empty(harness.COPY_BYTES, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], object]] = {c.name: c.run for c in cases}
    functions["copy"] = lambda: target.copy_(source)
    times = harness.time_interleaved(functions, iterations)
    copy_rate = 2 * harness.COPY_BYTES / times["copy"]

    def row(name: str, moved: int) -> dict[str, object]:
        rate = moved / times[name]
        return {
            "shape": label,
            "op": name,
            "time_us": times[name],
            "MB": moved / 1e6,
            "GB/s": rate / 1e3,
            "% of copy": 100 * rate / copy_rate,
        }

    return [row(c.name, c.bytes) for c in cases] + [row("copy", 2 * harness.COPY_BYTES)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--ops", nargs="+", help="only operators whose name contains one of these")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="append one JSON object per row")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a Hopper GPU; this machine has no CUDA device")
    torch.manual_seed(0)
    columns = ["shape", "op", "time_us", "MB", "GB/s", "% of copy"]
    for label in args.shapes:
        for make in (cast_cases, layer_cases):
            cases = make(SHAPES[label])
            if args.ops:
                cases = [c for c in cases if any(part in c.name for part in args.ops)]
            if not cases:
                continue
            rows = measure(label, cases, args.iterations)
            print(harness.table(rows, columns), end="\n\n", flush=True)
            harness.append_json(args.json, rows)
            del cases
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
