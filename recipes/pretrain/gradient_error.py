"""What FP8 does to a trained model's gradient, tensor by tensor.

    python -m recipes.pretrain.gradient_error runs/first

Two trainings of the same model part by chance, so their losses are a slow and noisy judge of a
rounding. This compares gradients instead, at one model's weights and on the same batches. With g
the gradient of the BF16 model, d what a rounding adds to it and E the mean over batches:

    bias   |E d| / |E g|                   what no larger batch averages out
    along  <E d, E g> / |E g|^2            the part of the bias that lengthens or shortens the step
    noise  rms |d - E d| / rms |g - E g|   its square is added to the variance of a batch's gradient

|E d|^2 and |E g|^2 are estimated without a share of the noise, as products of the means over every
other batch; too few batches may show no E g (nan). Rounded weights are off by the same in every
batch, so their error has a bias, though what comes out is the right gradient for those weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fp8moe
from fp8moe import quant

from . import checkpoint
from .config import Config, UserError, load
from .data import Batch, Loader, load_corpus
from .model import LanguageModel
from .run import CONFIG, RunFolder, check_same_data

Gradients = dict[str, Tensor]

PARTS = ("embedding", "attention", "router", "w13", "w2", "norm")
GEMMS = ("fprop", "dgrad", "wgrad")
ROUNDINGS = {
    "fp8": "all that the FP8 model rounds",
    "fprop": "operands of the forward GEMMs",
    "dgrad": "operands of the input gradients",
    "wgrad": "operands of the weight gradients",
    "w13": "one tensor, in a BF16 model",
    "w2": "one tensor, in a BF16 model",
    "x": "one tensor, in a BF16 model",
}


@dataclasses.dataclass(frozen=True)
class Error:
    """Of one part of the model, see above."""

    bias: float
    along: float
    noise: float


def part_of(parameter: str) -> str:
    return next(part for part in PARTS if part in parameter)


def _round_input(pow2: bool, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """x as the FP8 experts see it, with the gradient of x itself."""
    x, *others = arguments
    rounded = quant.dequantize(quant.per_token(x.flatten(0, -2), pow2=pow2)).view_as(x)
    return (x + (rounded.to(x.dtype) - x).detach(), *others)


def build(rounding: str | None, config: Config, weights: dict[str, Tensor]) -> LanguageModel:
    """The model of a run with one of ``ROUNDINGS``, or none: its BF16 twin."""
    if rounding in GEMMS:
        config = dataclasses.replace(config, fp8_gemms=rounding)
    precision = "fp8" if rounding in ("fp8", *GEMMS) else "bf16"
    with torch.device(config.device):
        model = LanguageModel(config, precision)
    model.load_state_dict(weights)
    if rounding in ("w13", "w2"):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(f".{rounding}"):
                    # As autocast and the cast of the FP8 model do it: to BF16 first.
                    cast = quant.per_block(weight.bfloat16(), pow2=config.pow2_scales)
                    weight.copy_(quant.dequantize(cast))
    if rounding == "x":
        for module in model.modules():
            if isinstance(module, fp8moe.Experts):
                module.register_forward_pre_hook(partial(_round_input, config.pow2_scales))
    return model


def gradients(model: LanguageModel, batch: Batch) -> Gradients:
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16):
        loss, balance = model(batch.tokens, batch.targets)
    (loss + balance).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class _Moments:
    """Sums of a gradient over the even and the odd batches, and of its square."""

    def __init__(self) -> None:
        self.sums: tuple[Gradients, Gradients] = ({}, {})
        self.squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def add(self, index: int, gradient: Gradients) -> None:
        sums = self.sums[index % 2]
        for name, value in gradient.items():
            sums[name] = sums[name] + value if name in sums else value.clone()
            self.squares[name] = self.squares[name].to(value.device) + value.double().square().sum()


def _product(one: Gradients, two: Gradients, names: Iterable[str]) -> float:
    return sum((one[n].double() * two[n].double()).sum().item() for n in names)


def measure(
    reference: Callable[[Batch], Gradients],
    other: Callable[[Batch], Gradients],
    batches: Sequence[Batch],
) -> dict[str, Error]:
    """The error of `other`'s gradients by part of the model.

    Args:
        reference, other: a batch to {parameter name: gradient}, the same names from both.
        batches: an even number of them, four or more.

    Raises: UserError for another number of batches.
    """
    half = len(batches) // 2
    if len(batches) % 2 or half < 2:
        raise UserError(f"--batches: expected an even number from 4, got {len(batches)}")
    right, wrong = _Moments(), _Moments()
    for index, batch in enumerate(batches):
        expected = reference(batch)
        right.add(index, expected)
        wrong.add(index, {n: value - expected[n] for n, value in other(batch).items()})
    names = defaultdict(list)
    for name in right.squares:
        names[part_of(name)].append(name)
    found = {}
    for part in sorted(names, key=PARTS.index):
        own = names[part]
        signal = _product(*right.sums, own) / half**2
        bias = _product(*wrong.sums, own) / half**2
        crossed = sum(_product(wrong.sums[i], right.sums[1 - i], own) for i in (0, 1))
        variances = [
            max(sum(m.squares[n].item() for n in own) / len(batches) - mean, 0.0)
            for m, mean in ((wrong, bias), (right, signal))
        ]
        found[part] = Error(
            bias=math.sqrt(max(bias, 0.0) / signal) if signal > 0 else math.nan,
            along=crossed / 2 / half**2 / signal if signal > 0 else math.nan,
            noise=math.sqrt(variances[0] / variances[1]) if variances[1] > 0 else math.nan,
        )
    return found


def measure_run(folder: Path, count: int, roundings: Sequence[str]) -> dict[str, dict[str, Error]]:
    """{rounding: {part: Error}} at the last checkpoint of a run, BF16's if it trained both.

    Raises: UserError if the folder holds no run or no checkpoint, or the text has changed.
    """
    run = RunFolder(folder.parent, folder.name)
    if not run.is_run:
        raise UserError(f"{folder}: expected the folder of a run, found no {CONFIG} in it")
    settings = run.settings()
    config = load(settings["config"])
    saved = checkpoint.latest(run.checkpoints)
    if saved is None:
        raise UserError(f"{folder}: expected a checkpoint (--checkpoint-every), found none")
    corpus = load_corpus(config)
    check_same_data(settings, corpus)
    weights = saved.tensors(f"{config.twins[0]}.model")
    loader = Loader(corpus, config)
    first = saved.state["step"]
    batches = [loader.step(first + i)[0] for i in range(count)]
    reference = build(None, config, weights)
    found = {}
    for rounding in roundings:  # one at a time: all their sums would not fit beside each other
        other = build(rounding, config, weights)
        found[rounding] = measure(
            lambda batch: gradients(reference, batch),
            lambda batch, model=other: gradients(model, batch),  # type: ignore[misc]
            batches,
        )
        del other
    return found


def print_table(found: dict[str, dict[str, Error]], console: Console) -> None:
    table = Table(title="Error of the gradient, in per cent", title_justify="left")
    for name in ("rounded", "", *next(iter(found.values()))):
        table.add_column(name, justify="right")
    for rounding, parts in found.items():
        cells = [
            f"{100 * e.bias:.1f}\n{100 * e.along:+.1f}\n{100 * e.noise:.1f}" for e in parts.values()
        ]
        table.add_row(rounding, "bias\nalong\nnoise", *cells, end_section=True)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.pretrain.gradient_error", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="folder of a run with a checkpoint")
    parser.add_argument("--batches", type=int, default=32, help="default: 32")
    parser.add_argument(
        "--roundings", nargs="+", choices=ROUNDINGS, default=list(ROUNDINGS), metavar="NAME",
        help="; ".join(f"{name}: {text}" for name, text in ROUNDINGS.items()),
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also append one JSON object to this file")
    args = parser.parse_args(argv)
    try:
        found = measure_run(args.run, args.batches, args.roundings)
    except UserError as error:
        parser.error(str(error))
    print_table(found, Console(highlight=False))
    if args.json:
        plain = {
            rounding: {part: dataclasses.asdict(error) for part, error in parts.items()}
            for rounding, parts in found.items()
        }
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": str(args.run), "batches": args.batches} | plain) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
