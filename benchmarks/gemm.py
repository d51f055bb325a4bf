"""GEMM speed against cuBLAS and torch's grouped GEMMs, timed alternately in one run.

    python -m benchmarks.gemm                      # every family
    python -m benchmarks.gemm --family k_grouped --json results/gemm.jsonl
    python -m benchmarks.gemm --search             # every shipped tile instead of the chosen one
    python -m benchmarks.gemm --sustained --plot gemm.png

Each shape is checked against an FP32 product of the dequantized operands before it is timed. Peers:
``torch._scaled_mm`` tensorwise (dense), ``torch._scaled_grouped_mm`` rowwise (m_grouped), torch's
BF16 ``_grouped_mm`` (wgrad; ours writes FP32 there, BF16 as the peer in ``fine_wgrad``). ``ratio``
is peer time / our time: above 1 we are faster. ``us`` is kernel time after a flush of L2; ``host
us`` what a launch costs the host, descriptors included, on an idle GPU. The family ``unaligned``
has the groups of ``m_grouped`` with every inner end moved off the multiples of 128.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import harness
from fp8moe import quant, testing
from fp8moe.kernels import gemm, heuristics
from fp8moe.kernels.fp8tensor import FP8Tensor, padded_capacity

GATE = 2.5e-3  # worst row: the BF16 output rounding is 1.7e-3


class Shape(NamedTuple):
    family: str
    groups: int
    m: int  # rows per group; for k_grouped: rows of A, and k rows of the group are contracted
    n: int
    k: int
    uneven: bool = False
    moved: bool = False  # group ends off the multiples of 128


_DENSE_NK = [
    (2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168),
    (7168, 2048), (7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096),
    (2048, 7168), (7168, 576),
]  # fmt: skip
_SHORT_NK = [
    (2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168),
    (7168, 2048),
]  # fmt: skip
_GROUPED_NK = [(4096, 7168), (7168, 2048), (4096, 2048), (4096, 4096), (6144, 7168), (7168, 3072)]
_MASKED = [
    *((g, m, n, k) for g, m in ((1, 1024), (2, 512), (4, 256)) for n, k in _GROUPED_NK[:2]),
    *(
        (g, m, n, k)
        for g, m in ((6, 1024), (6, 20), (32, 192), (32, 20))
        for n, k in _GROUPED_NK[2:]
    ),
]
_WGRAD_MN = [(7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168)]

SHAPES = [
    *(Shape("dense", 1, 4096, n, k) for n, k in _DENSE_NK),
    *(Shape("short", 1, m, n, k) for m in (1, 64, 128) for n, k in _SHORT_NK),
    *(Shape("m_grouped", g, m, n, k) for g, m in ((4, 8192), (8, 4096)) for n, k in _GROUPED_NK),
    *(
        Shape("unaligned", g, m, n, k, moved=True)
        for g, m in ((4, 8192), (8, 4096))
        for n, k in _GROUPED_NK
    ),
    *(Shape("masked", *shape) for shape in _MASKED),
    Shape("k_grouped", 8, 4096, 7168, 4096),
    Shape("k_grouped", 8, 7168, 2048, 4096),
    Shape("k_grouped", 4, 4096, 7168, 8192),
    Shape("k_grouped", 4, 7168, 2048, 8192),
    Shape("k_grouped", 16, 4096, 7168, 2048),
    Shape("k_grouped", 16, 7168, 2048, 2048),
    *(Shape("wgrad", 1, m, n, k) for m, n in _WGRAD_MN for k in (4096, 8192)),
    *(Shape("fine", 128, 1024, n, k, True) for n, k in ((1536, 2048), (2048, 768))),
    *(Shape("fine", 64, 2048, n, k, True) for n, k in ((2048, 2048), (2048, 1024))),
    *(Shape("fine_wgrad", 128, n, k, 1024, True) for n, k in ((1536, 2048), (2048, 768))),
    *(Shape("fine_wgrad", 64, n, k, 2048, True) for n, k in ((2048, 2048), (2048, 1024))),
]


class Case(NamedTuple):
    """A prepared shape: run(config) -> out, the peers, and the exact result of one group."""

    run: Callable[..., torch.Tensor]
    problem: heuristics.Problem
    peers: dict[str, Callable[[], object]]
    check: Callable[[], float]
    flops: float


def _sizes(s: Shape, mean: int) -> list[int]:
    if s.moved:
        ends = [mean * (g + 1) + 1 + 37 * g % 90 for g in range(s.groups - 1)]
        ends.append(mean * s.groups)
        return [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    if not s.uneven:
        return [mean] * s.groups
    ends = testing.ragged_group_ends(mean * s.groups, s.groups, seed=1, kind="uniform").tolist()
    return [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _ends(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return (x * (448 / x.abs().amax())).to(torch.float8_e4m3fn)


def _weights(groups: int, n: int, k: int) -> tuple[torch.Tensor, FP8Tensor]:
    w = torch.randn(groups, n, k, device="cuda", dtype=torch.bfloat16)
    return w, quant.per_block(w, pow2=True)


def _forward(s: Shape) -> Case:
    sizes = _sizes(s, s.m)
    rows = sum(sizes)
    x = torch.randn(rows, s.k, device="cuda", dtype=torch.bfloat16)
    w, b = _weights(s.groups, s.n, s.k)
    a = quant.per_token(x, pow2=True)
    ends = _ends(sizes)
    out = torch.full((rows, s.n), float("nan"), device="cuda", dtype=torch.bfloat16)
    peers: dict[str, Callable[[], object]] = {}
    if s.family in ("dense", "short"):
        b = FP8Tensor(b.data[0], b.scale[0])
        kind, groups = heuristics.Grouping.DENSE, None
        one = torch.ones((), device="cuda")
        a8, b8 = _fp8(x), _fp8(w[0])
        peers["cublas_fp8"] = lambda: torch._scaled_mm(
            a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    elif s.family == "masked":
        kind, groups = heuristics.Grouping.MASKED, torch.tensor(sizes, device="cuda").int()
        a = FP8Tensor(a.data.view(s.groups, s.m, s.k), a.scale.unflatten(0, (s.groups, s.m)))
        out = out.view(s.groups, s.m, s.n)
    else:
        kind, groups = heuristics.Grouping.M_GROUPED, ends
        row, column = torch.ones(rows, device="cuda"), torch.ones(s.groups, s.n, device="cuda")
        a8, b8 = _fp8(x), _fp8(w)
        peers["torch_fp8_rowwise"] = lambda: torch._scaled_grouped_mm(
            a8, b8.transpose(-2, -1), row, column, offs=ends, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
    problem = heuristics.Problem(
        kind, heuristics.Output.BF16, s.m if kind == heuristics.Grouping.MASKED else rows,
        s.n, s.k, s.groups,
    )  # fmt: skip

    def run(config: tuple[heuristics.Tile, int] | None = None) -> torch.Tensor:
        gemm._launch(problem, a.data, a.scale, b.data, b.scale, groups, out, config)
        return out

    def check() -> float:
        flat, worst = out.view(-1, s.n), 0.0
        w8 = quant.dequantize(b).view(s.groups, s.n, s.k)
        x8 = quant.dequantize(FP8Tensor(a.data.view(-1, s.k), a.scale.flatten(0, -2)))
        start = 0
        for g, size in enumerate(sizes):
            part = slice(start, start + min(size, 256))
            worst = max(
                worst, testing.worst_row_error(flat[part], x8[part].double() @ w8[g].double().t())
            )
            start += size
        return worst

    return Case(run, problem, peers, check, 2.0 * rows * s.n * s.k)


def _wgrad(s: Shape, output: heuristics.Output = heuristics.Output.F32) -> Case:
    sizes = _sizes(s, s.k)
    rows, ends = sum(sizes), _ends(sizes)
    dy = torch.randn(rows, s.m, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, s.n, device="cuda", dtype=torch.bfloat16)
    a = quant.per_channel(dy, ends, pow2=True)
    b = quant.per_channel(x, ends, pow2=True, block=True)
    dtype = torch.bfloat16 if output == heuristics.Output.BF16 else torch.float32
    out = torch.full((s.groups, s.m, s.n), float("nan"), device="cuda", dtype=dtype)
    problem = heuristics.Problem(
        heuristics.Grouping.K_GROUPED, output, s.m, s.n, padded_capacity(rows, s.groups), s.groups
    )

    def run(config: tuple[heuristics.Tile, int] | None = None) -> torch.Tensor:
        gemm._launch(problem, a.data, a.scale, b.data, b.scale, ends, out, config)
        return out

    def check() -> float:
        start, worst = 0, 0.0
        for g, size in enumerate(sizes):
            span = slice(start, start + -(-size // 128) * 128)
            blocks = slice(span.start // 128, span.stop // 128)
            fa = FP8Tensor(a.data[:256, span], a.scale[:256, blocks])
            fb = FP8Tensor(b.data[:, span], b.scale[:, blocks])
            exact = quant.dequantize(fa).double() @ quant.dequantize(fb).double().t()
            worst = max(worst, testing.worst_row_error(out[g, :256], exact))
            start = span.stop
        return worst

    peers: dict[str, Callable[[], object]] = {
        "torch_bf16_grouped": lambda: torch._grouped_mm(dy.t(), x, offs=ends)
    }
    return Case(run, problem, peers, check, 2.0 * rows * s.m * s.n)


def prepare(s: Shape) -> Case:
    """Random operands, poisoned output, peers and check of one shape."""
    if s.family == "fine_wgrad":
        return _wgrad(s, heuristics.Output.BF16)
    return _wgrad(s) if s.family in ("k_grouped", "wgrad") else _forward(s)


def configurations(p: heuristics.Problem, sms: int) -> Iterator[tuple[heuristics.Tile, int]]:
    """Every shipped tile with its band."""
    for tile in heuristics.candidates(p.grouping):
        yield tile, heuristics.band(p, tile, sms)


def measure(s: Shape, search: bool, iterations: int, sustained: bool) -> list[dict[str, object]]:
    case = prepare(s)
    chosen = heuristics.choose(case.problem, gemm.num_sms(0))
    configs = list(configurations(case.problem, gemm.num_sms(0))) if search else [chosen]
    names = {str(t): (t, b) for t, b in configs}
    for name, config in names.items():
        testing.poison(case.run(config))
        case.run(config)
        torch.cuda.synchronize()
        error = case.check()
        if not error < GATE:
            raise SystemExit(f"{s} with {name}: worst row error {error:.2e} is not below {GATE}")
    functions: dict[str, Callable[[], object]] = {
        name: (lambda c=config: case.run(c)) for name, config in names.items()
    }
    times = harness.time_kernels({**functions, **case.peers}, iterations)
    host = harness.host_time(functions[next(iter(functions))])
    peer = next(iter(case.peers), None)
    peer_host = harness.host_time(case.peers[peer]) if peer else None
    rows = []
    for name, config in names.items():
        row: dict[str, object] = {
            "family": s.family, "G": s.groups, "m": s.m, "n": s.n, "k": s.k,
            "tile": name, "us": times[name], "tflops": case.flops / times[name] / 1e6,
            "chosen": "*" if config == chosen else "", "host us": host,
        }  # fmt: skip
        if peer:
            row["peer host us"] = peer_host
            row |= {"peer": peer, "peer_us": times[peer], "ratio": times[peer] / times[name]}
        if sustained:
            ours = harness.time_sustained(functions[name])
            row["sustained_tflops"] = case.flops / ours / 1e6
            if peer:
                row["sustained_ratio"] = harness.time_sustained(case.peers[peer]) / ours
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm", description=__doc__.splitlines()[0]
    )
    families = list(dict.fromkeys(s.family for s in SHAPES))
    parser.add_argument("--family", nargs="*", choices=families, help="of shapes; default: all")
    parser.add_argument("--search", action="store_true", help="time every shipped tile")
    parser.add_argument("--sustained", action="store_true", help="also back to back")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="append one JSON object per row")
    parser.add_argument("--plot", metavar="FILE", help="picture of TFLOP/s beside the peers'")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a Hopper GPU; this machine has no CUDA device")
    columns = [
        "family", "G", "m", "n", "k", "tile", "chosen", "us", "tflops", "peer", "peer_us", "ratio",
        "host us", "peer host us", "sustained_tflops", "sustained_ratio",
    ]  # fmt: skip
    everything = []
    for family in args.family or dict.fromkeys(s.family for s in SHAPES):
        rows = []
        for shape in (s for s in SHAPES if s.family == family):
            rows += measure(shape, args.search, args.iterations, args.sustained)
        used = [c for c in columns if any(c in r for r in rows)]
        print(harness.table(rows, used), flush=True)
        ratios = [float(str(r["ratio"])) for r in rows if "ratio" in r and r["chosen"]]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(
                f"{family}: geometric mean ratio {mean:.3f}, lowest {min(ratios):.3f}\n", flush=True
            )
        everything += rows
    harness.append_json(args.json, everything)
    if args.plot:
        plot(everything, args.plot)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """TFLOP/s of the chosen tile and of the peer, a panel a family."""
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row["chosen"]]
    families = list(dict.fromkeys(row["family"] for row in chosen))
    figure = Figure(figsize=(9, 2.6 * len(families)), layout="constrained")
    for axes, family in zip(
        figure.subplots(len(families), squeeze=False)[:, 0], families, strict=True
    ):
        part = [row for row in chosen if row["family"] == family]
        at = range(len(part))
        axes.bar([i - 0.2 for i in at], [row["tflops"] for row in part], 0.4, label="fp8moe")
        beside = [
            (i + 0.2, row["tflops"] / row["ratio"]) for i, row in enumerate(part) if "ratio" in row
        ]
        if beside:
            axes.bar(*zip(*beside, strict=True), 0.4, label=part[0]["peer"])
        axes.set_xticks(
            list(at), [f"{r['G']}x{r['m']}\n{r['n']}x{r['k']}" for r in part], fontsize=6
        )
        axes.set_ylabel(f"{family}\nTFLOP/s")
        axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
