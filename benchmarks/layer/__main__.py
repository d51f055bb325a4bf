"""Command line of the layer benchmark; see README.md in this folder."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from typing import Any

import torch

import fp8moe
from benchmarks import harness
from benchmarks.layer import fusion, host, parts, peers, plot
from benchmarks.layer.contenders import CONTENDERS, Layer, step
from benchmarks.layer.workload import Shape, make_inputs, parse_shape
from benchmarks.memory import SHAPES

Part = Callable[[Shape, dict[str, Layer]], parts.Rows]
PARTS = ("time", "kernels", "weights", "fusion", "fusion backward", "skew", "small", "host")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer",
        description="Time, memory and kernels of the expert layer beside a torch BF16 layer.",
    )
    parser.add_argument(
        "--shape", nargs="+", default=list(SHAPES), metavar="SHAPE",
        help=f"{', '.join(SHAPES)} (default: all), or T,K,E,H,I",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--layers", nargs="+", choices=[*CONTENDERS], default=[*CONTENDERS], metavar="LAYER",
        help=f"of {', '.join(CONTENDERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--peers", nargs="*", choices=[*peers.PEERS], default=[], metavar="PEER",
        help=f"also {', '.join(peers.PEERS)}, where installed",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda",
        help="cpu runs the emulation: bytes and memory mean something there, times do not",
    )  # fmt: skip
    parser.add_argument(
        "--profile-host", action="store_true", help="part 'host': print where the time goes"
    )
    parser.add_argument("--json", metavar="FILE", help="append one JSON object per row")
    parser.add_argument("--plot", metavar="FILE", help="picture of the part 'kernels'")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA GPU, found none")
    if args.plot and ("kernels" not in args.parts or args.device == "cpu"):
        parser.error("--plot: expected the part 'kernels' on a GPU")
    try:
        args.shape = dict(parse_shape(text) for text in args.shape)
        args.peers = {name: peers.load(name) for name in args.peers}
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(arguments)
    device = torch.device(args.device)
    layers: dict[str, Layer] = {name: CONTENDERS[name] for name in args.layers}
    effort = parts.QUICK if args.quick else parts.FULL
    run: dict[str, Part] = {
        "time": lambda s, some: parts.time_part(s, some, effort, device),
        "kernels": lambda s, some: parts.kernels_part(s, some, effort, device),
        "weights": lambda s, some: parts.weights_part(s, effort, device),
        "fusion": lambda s, some: fusion.fusion_part(s, effort, device),
        "fusion backward": lambda s, some: fusion.fusion_backward_part(s, effort, device),
        "skew": lambda s, some: parts.skew_part(s, some, effort, device),
        "small": lambda s, some: parts.small_part(s, some, effort, device),
        "host": lambda s, some: parts.host_part(s, some, effort, device),
    }
    everything: list[dict[str, Any]] = []
    failed: list[str] = []
    for label, shape in args.shape.items():
        for part in args.parts:
            print(f"{part}, {label}: {shape}")
            try:
                found = with_peers(run[part], shape, layers, args.peers)
                if found is None:
                    failed.append(f"{part} of {label} with peers")
                    found = run[part](shape, layers)
                rows = [{"part": part, "shape": label, **row} for row in found]
                columns = list(dict.fromkeys(c for row in rows for c in row))[2:]
                print(harness.table(rows, columns), end="\n\n", flush=True)
                harness.append_json(args.json, rows)
                everything += rows
                if part == "host" and args.profile_host:
                    print_host_profile(shape, layers | args.peers, device)
            except Exception:  # the other parts' figures must not be lost with this one's
                traceback.print_exc()
                failed.append(f"{part} of {label}")
            fp8moe.clear_weight_cache()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.plot:
        plot.save(everything, args.plot)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return everything


def with_peers(
    part: Part, shape: Shape, layers: dict[str, Layer], rivals: dict[str, Layer]
) -> parts.Rows | None:
    """A part with the peers; None where one of them fails, which must not cost ours their row."""
    try:
        return part(shape, layers | rivals)
    except Exception:
        if not rivals:
            raise
        traceback.print_exc()
        return None


def print_host_profile(shape: Shape, layers: dict[str, Layer], device: torch.device) -> None:
    inputs = make_inputs(shape._replace(tokens=min(shape.tokens, 512)), device)
    for name, layer in layers.items():
        print(f"{name}\n{host.profile(step(layer, inputs), 50)}", flush=True)


if __name__ == "__main__":
    main()
