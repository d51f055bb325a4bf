"""Whether two runs learn alike: python -m recipes.pretrain.compare runs/one runs/two.

Meant for runs of the same settings on the same batches whose sums differ only in their order, such
as --ep 1 and --ep 2. Prints one JSON object for each model that both runs trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import metrics
from .config import UserError

EARLY = 6  # steps in which rounding has not yet led the runs apart


def compare(one: Path, two: Path, model: str) -> dict[str, Any]:
    """How far apart the losses of a model are in two runs.

    Returns:
        early: the largest relative difference in the first ``EARLY`` steps. late: the relative
        difference between the means of the last quarter. noise: the standard deviation of one
        step's loss around its neighbours there, relative, divided by the root of the steps: what
        other batches would change in that mean. Then the last validation losses and the mean
        tokens per second of both.

    Raises:
        UserError: the runs did not both train the model for the same number of steps.
    """
    records = [metrics.read(folder) for folder in (one, two)]
    a, b = ([r["loss"] for r in metrics.of_kind(run, metrics.TRAIN, model)] for run in records)
    if len(a) != len(b) or len(a) < 2 * EARLY:
        raise UserError(
            f"expected two runs of {model} with the same steps, {2 * EARLY} or more, "
            f"got {len(a)} in {one} and {len(b)} in {two}"
        )
    quarter = max(3, len(a) // 4)
    means = [statistics.mean(losses[-quarter:]) for losses in (a, b)]
    jumps = [
        after - before for before, after in zip(a[-quarter:-1], a[-quarter + 1 :], strict=True)
    ]
    noise = statistics.stdev(jumps) / 2**0.5 / quarter**0.5
    out = {
        "model": model,
        "steps": len(a),
        "early": max(abs(y / x - 1) for x, y in zip(a[:EARLY], b[:EARLY], strict=True)),
        "late": abs(means[1] / means[0] - 1),
        "noise": noise / means[0],
        "loss": means,
    }
    for name, kind, key in (
        ("validation_loss", metrics.VALID, "loss"),
        ("tokens_per_s", metrics.SPEED, "tokens_per_s"),
    ):
        values = [[r[key] for r in metrics.of_kind(run, kind, model)] for run in records]
        if all(values):
            pick = statistics.mean if kind == metrics.SPEED else (lambda found: found[-1])
            out[name] = [pick(found) for found in values]
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.pretrain.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("one", type=Path, help="folder of a run")
    parser.add_argument("two", type=Path, help="folder of another")
    args = parser.parse_args(argv)
    trained = [{r.get("model") for r in metrics.read(run)} for run in (args.one, args.two)]
    both = sorted(filter(None, trained[0] & trained[1]))
    if not both:
        parser.error(f"expected two runs with a model in common, got {args.one} and {args.two}")
    try:
        for model in both:
            print(json.dumps(compare(args.one, args.two, model)))
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
