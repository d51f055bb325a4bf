"""The ``fp8moe`` command: ``doctor``, ``warmup`` and ``bench``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Sequence

from fp8moe.shapes import PRESETS, LayerShape

USABLE, FAILED = 0, 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="the expert layer of a published model")
    parser.add_argument("--hidden", type=_positive, metavar="H", help="hidden size")
    parser.add_argument("--intermediate", type=_positive, metavar="I", help="expert width")
    parser.add_argument("--experts", type=_positive, metavar="E", help="experts on one GPU")
    parser.add_argument("--topk", type=_positive, metavar="K", help="experts per token")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fp8moe", description="FP8 mixture-of-experts training.")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine can do, and why not",
        description="What this machine can do with fp8moe, and why not. Exits 0 if any backend "
        "works, else 1.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")

    warmup = commands.add_parser(
        "warmup",
        help="compile kernels ahead of time; needs no GPU",
        description="Compile kernels into the disk cache, in parallel; needs no GPU. Without "
        "sizes, every shipped kernel; with sizes, those that expert layers of these sizes use.",
    )
    _add_shape_arguments(warmup)
    warmup.add_argument(
        "--tokens",
        type=_positive,
        nargs="+",
        metavar="T",
        help="tokens per micro-batch (default: the powers of two from 128 to 65536)",
    )
    warmup.add_argument(
        "--sms",
        type=_positive,
        help="multiprocessors of the GPU to compile for (default: this machine's GPU, else 132)",
    )
    warmup.add_argument("--jobs", type=_positive, metavar="N", help="threads (default: all cores)")

    bench = commands.add_parser(
        "bench",
        help="time the GEMMs and an expert layer; needs a Hopper GPU",
        description="Time the GEMMs and one expert layer, FP8 beside BF16. Needs a Hopper GPU.",
    )
    _add_shape_arguments(bench)
    bench.add_argument("--tokens", type=_positive, default=16384, metavar="T")
    return parser


def _shape(
    args: argparse.Namespace, parser: argparse.ArgumentParser, default: str | None
) -> LayerShape | None:
    """The layer asked for by --preset and the sizes (which override it); None for neither."""
    sizes = ("hidden", "intermediate", "experts", "topk")
    given = {name: value for name in sizes if (value := getattr(args, name)) is not None}
    preset = args.preset or (default if not given else None)
    if preset is not None:
        return dataclasses.replace(PRESETS[preset], **given)
    if not given:
        return None
    absent = [f"--{name}" for name in sizes if name not in given]
    if absent:
        parser.error(f"{args.command}: expected also {', '.join(absent)}, or a --preset")
    return LayerShape(**given)


def _doctor(args: argparse.Namespace) -> int:
    from fp8moe import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.json else doctor.describe(report))
    return USABLE if report["usable"] else FAILED


def _this_gpus_sms() -> int:
    import torch

    from fp8moe.kernels import driver
    from fp8moe.warmup import H100_SMS

    try:
        driver.driver()
    except driver.DriverError:
        return H100_SMS
    if not torch.cuda.is_available():
        return H100_SMS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _warmup(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from fp8moe import warmup
    from fp8moe.kernels import disk_cache, jit

    shape = _shape(args, parser, default=None)
    if shape is None:
        if args.tokens or args.sms:
            parser.error("warmup: --tokens and --sms go with --preset or sizes")
        specs = warmup.all_specs()
    else:
        specs = warmup.layer_specs(
            shape, args.tokens or warmup.TOKENS, args.sms or _this_gpus_sms()
        )
    specs = list(dict.fromkeys(specs))
    try:
        disk_cache.check_writable()  # compiling ahead for a cache that keeps nothing helps nobody
    except OSError as reason:
        raise RuntimeError(
            f"the kernel cache {disk_cache.directory()} cannot be written "
            f"({reason.strerror or reason}); set FP8MOE_CACHE_DIR to a writable directory"
        ) from reason
    print(f"{len(specs)} kernels for {jit.ARCH}, cache {disk_cache.directory()}", flush=True)
    progress = _Progress(len(specs))
    start = time.perf_counter()
    results = jit.warmup(specs, args.jobs, progress.done)
    progress.close()
    errors = [result.error for result in results if result.error is not None]
    for error in errors:
        print(f"\n{error}", file=sys.stderr)
    ready = len(specs) - len(errors)
    print(f"{ready} of {len(specs)} kernels ready in {time.perf_counter() - start:.1f} s")
    return FAILED if errors else USABLE


class _Progress:
    """A counter line that redraws itself on a terminal, and a line per tenth elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0
        self._lock = threading.Lock()
        self._live = sys.stdout.isatty()
        self._step = max(1, total // 10)

    def done(self, result) -> None:
        with self._lock:
            self._count += 1
            line = f"[{self._count}/{self._total}] {result.time_s:.2f} s {result.spec}"
            if self._live:
                sys.stdout.write(f"\r\x1b[K{line[:100]}")
                sys.stdout.flush()
            elif self._count % self._step == 0 or self._count == self._total:
                print(line, flush=True)

    def close(self) -> None:
        if self._live and self._total:
            print()


def _bench(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from fp8moe import bench

    reason = bench.missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return FAILED
    shape = _shape(args, parser, default="olmoe-1b-7b")
    assert shape is not None  # there is a default
    bench.run(shape, args.tokens, lambda line: print(line, flush=True))
    return USABLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 good, 1 failed, 2 wrong usage)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "doctor":
        return _doctor(args)
    try:
        return _warmup(args, parser) if args.command == "warmup" else _bench(args, parser)
    except (RuntimeError, ValueError) as error:
        print(f"fp8moe {args.command}: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
