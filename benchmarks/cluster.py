"""What an expert-parallel layer would cost on many hosts, on paper, from what was measured on one.

    python -m benchmarks.cluster --compute-ms 8.82 --nvlink 195 --network 50

Prints the tables of docs/expert_parallel.md for a layer of DeepSeek-V3's size. Inputs:

    compute-ms    forward and backward of the experts of one GPU for ROWS rows:
                  "ms" of the row dsv3, ep 1, of benchmarks/expert_parallel.py
    nvlink        GB/s a GPU sends to others of its host: "wire GB/s" there
    network       GB/s a GPU sends to other hosts; 50 is the rate of a 400 Gb/s link

The model. A GPU has T = ROWS / K tokens. With n hosts of 8 GPUs a token may use the experts of m of
them; within these its K experts are drawn at random. So it meets

    met(p) = p (1 - C(e - e/p, K) / C(e, K))     of p equal parts of the e experts in reach

A copy of a token costs 2 (H + H/32) + 8 K bytes to the experts (x, dy, scales, weights and ids) and
2 * 2 H back (y and dx, summed where they come from). Copies of a token sent over the network and
over NVLink, r ranks met on h hosts:

    once per rank    r (1 - 1/n)    r / n * 7/8        all-to-all of NCCL, this package's
    once per host    h (1 - 1/n)    r * 7/8            spread over NVLink on arrival, as DeepEP does

Both go on at the same time, so communication takes the longer of them. Left out: latency, waiting
for the fullest rank, copies into messages.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from fp8moe.shapes import PRESETS, LayerShape

LAYER = PRESETS["deepseek-v3"]
ROWS = 32768
PER_HOST = 8
TRANSPORTS = ("once per rank", "once per host")


class Measured(NamedTuple):
    """ms; GB/s; GB/s: see the module's docstring."""

    compute_ms: float
    nvlink: float
    network: float


class Cost(NamedTuple):
    """Of one layer, forward and backward, on each GPU; means over tokens.

    Args:
        ranks, hosts: that a token meets.
        network_mb, nvlink_mb: sent.
        comm_ms: the longer of the two.
        exposed, hidden: compute time over the layer's, with no communication hidden and with all
            that compute can hide.
    """

    ranks: float
    hosts: float
    network_mb: float
    nvlink_mb: float
    comm_ms: float
    exposed: float
    hidden: float


def met(parts: int, choices: int, experts: int) -> float:
    """How many of `parts` equal parts of the experts hold one of `choices` random ones."""
    return parts * (1 - comb(experts - experts // parts, choices) / comb(experts, choices))


def layer_cost(
    shape: LayerShape, ep: int, most_hosts: int, transport: str, measured: Measured
) -> Cost:
    """The cost of a layer whose experts are spread over `ep` GPUs, a multiple of 8.

    Raises: ValueError naming the argument.
    """
    if ep < PER_HOST or ep % PER_HOST or shape.experts % ep:
        raise ValueError(
            f"ep: expected a multiple of {PER_HOST} that divides the {shape.experts} experts, "
            f"got {ep}"
        )
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {TRANSPORTS}, got {transport!r}")
    all_hosts = ep // PER_HOST
    used = min(all_hosts, most_hosts)
    in_reach = shape.experts * used // all_hosts
    ranks, hosts = (met(parts, shape.topk, in_reach) for parts in (used * PER_HOST, used))
    away, on_host = 1 - 1 / all_hosts, 1 - 1 / PER_HOST
    if transport == "once per rank":
        over_network, over_nvlink = ranks * away, ranks / all_hosts * on_host
    else:
        over_network, over_nvlink = hosts * away, ranks * on_host
    h = shape.hidden
    copy = 2 * (h + h // 32) + 8 * shape.topk + 2 * (2 * h)
    network, nvlink = (ROWS // shape.topk * n * copy / 1e6 for n in (over_network, over_nvlink))
    comm_ms = max(network / measured.network, nvlink / measured.nvlink)
    compute = measured.compute_ms
    return Cost(
        ranks, hosts, network, nvlink, comm_ms,
        compute / (compute + comm_ms), compute / max(compute, comm_ms),
    )  # fmt: skip


def gradient_mb(shape: LayerShape, gpus: int, ep: int) -> float:
    """MB a GPU sends while the gpus / ep replicas of its experts sum BF16 gradients in a ring."""
    replicas, weights = gpus // ep, 3 * shape.hidden * shape.intermediate * shape.experts // ep
    return 2 * (replicas - 1) / replicas * weights * 2 / 1e6


def tables(measured: Measured) -> str:
    """Both tables in Markdown."""
    lines = [
        "| ep | hosts a token may use | sent | ranks it meets | hosts | MB over the network "
        "| MB over NVLink | ms | efficiency, nothing hidden | all hidden |",
        "| --- " * 10 + "|",
    ]
    for ep in (8, 64, 256):
        hosts = ep // PER_HOST
        for most in sorted({hosts, min(hosts, 4)}, reverse=True):
            for transport in TRANSPORTS if hosts > 1 else TRANSPORTS[:1]:
                c = layer_cost(LAYER, ep, most, transport, measured)
                lines.append(
                    f"| {ep} | {most} | {transport} | {c.ranks:.1f} | {c.hosts:.1f} "
                    f"| {c.network_mb:.0f} | {c.nvlink_mb:.0f} | {c.comm_ms:.1f} "
                    f"| {c.exposed:.0%} | {c.hidden:.0%} |"
                )
    lines += ["", "| GPUs | ep | replicas of an expert | MB over the network | ms |"]
    lines += ["| --- " * 5 + "|"]
    for gpus in (64, 256, 2048):
        for ep in (64, 256):
            if ep <= gpus:
                mb = gradient_mb(LAYER, gpus, ep)
                lines.append(
                    f"| {gpus} | {ep} | {gpus // ep} | {mb:.0f} | {mb / measured.network:.1f} |"
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in Measured._fields:
        top.add_argument(f"--{name.replace('_', '-')}", type=float, required=True)
    measured = Measured(**vars(top.parse_args(argv)))
    for name, value in measured._asdict().items():
        if not 0 < value < float("inf"):
            top.error(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    print(tables(measured))


if __name__ == "__main__":
    main()
