"""The tables and the picture of a proof, from the records in ``proof.json`` alone."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, load
from .metrics import smooth
from .report import TOLERANCE, last_quarter

BASE = "bf16"  # the setting that all others are held against
COLORS = {
    "bf16": "#4477aa", "fp8": "#ee6677", "fp8-save-bf16": "#228833", "fp8-no-pow2": "#aa3377",
    "bf16-nudged": "#bbbbbb", "fp8-fprop": "#ccbb44", "fp8-dgrad": "#66ccee",
    "fp8-wgrad": "#000000",
}  # fmt: skip

Runs = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """One run at its end. Losses are nats per byte."""

    setting: str
    seed: int
    train_loss: float  # mean over the last quarter of the steps
    valid_loss: float  # over the held-out text, after the last step
    tokens_per_s: float  # median; start-up, validation and logging excluded
    step_ms: float  # median
    memory_bytes: int  # largest of a step
    expert_share: float  # of the time of forward and backward
    seconds: float  # of the whole process


def result(record: Mapping[str, Any]) -> Result:
    kept = {field.name: record[field.name] for field in dataclasses.fields(Result)[4:]}
    return Result(
        setting=record["setting"],
        seed=record["seed"],
        train_loss=statistics.fmean(last_quarter(record["loss"])),
        valid_loss=record["valid"][-1][1],
        **kept,
    )


def relative(value: float, base: float) -> float:
    return (value - base) / base


@dataclass(frozen=True)
class Difference:
    """A run against another one: (this - other) / other of each loss."""

    train: float
    valid: float

    @classmethod
    def of(cls, this: Result, other: Result) -> Difference:
        return cls(
            relative(this.train_loss, other.train_loss), relative(this.valid_loss, other.valid_loss)
        )

    @classmethod
    def mean(cls, several: Iterable[Difference]) -> Difference:
        listed = list(several)
        return cls(
            *(statistics.fmean(v) for v in zip(*map(dataclasses.astuple, listed), strict=True))
        )

    @classmethod
    def error(cls, several: Iterable[Difference]) -> Difference | None:
        """The standard error of the mean, from how far the seeds are apart; None for one seed."""
        listed = list(several)
        if len(listed) < 2:
            return None
        columns = zip(*map(dataclasses.astuple, listed), strict=True)
        return cls(*(statistics.stdev(v) / len(listed) ** 0.5 for v in columns))


def by_setting(runs: Runs) -> dict[str, dict[int, Result]]:
    """{setting: {seed: result}}, BF16 first, seeds in order."""
    found: dict[str, dict[int, Result]] = {}
    for one in sorted(map(result, runs.values()), key=lambda r: (r.setting != BASE, r.seed)):
        found.setdefault(one.setting, {})[one.seed] = one
    return found


def against_base(runs: Runs) -> dict[str, dict[int, Difference]]:
    """{setting: {seed: difference to BF16 of that seed}} where both runs are there."""
    results = by_setting(runs)
    base = results.get(BASE, {})
    return {
        setting: {s: Difference.of(one, base[s]) for s, one in seeds.items() if s in base}
        for setting, seeds in results.items()
        if setting != BASE
    }


def between_seeds(runs: Runs) -> dict[int, Difference]:
    """{seed: BF16 of that seed against BF16 of the first seed}: what chance does."""
    base = by_setting(runs).get(BASE, {})
    first = min(base, default=0)
    return {s: Difference.of(one, base[first]) for s, one in base.items() if s != first}


def passes(runs: Runs) -> tuple[float, float]:
    """How often the text was read when the last quarter of the steps begins, and at the end."""
    one = next(iter(runs.values()))
    config = load(one["config"])
    steps, read = config.steps, config.tokens_per_step / one["data"]["train_bytes"]
    return (steps - max(1, steps // 4)) * read, steps * read


def summary(runs: Runs) -> dict[str, Any]:
    """The figures of the tables, for ``proof.json``."""
    differences = against_base(runs)
    before, end = passes(runs)
    plain = dataclasses.asdict
    return {
        "tolerance": TOLERANCE,
        "passes_over_the_text": {"before_last_quarter": before, "at_the_end": end},
        "runs": [plain(one) for seeds in by_setting(runs).values() for one in seeds.values()],
        "difference_to_bf16": {
            setting: {
                "seeds": {str(seed): plain(d) for seed, d in seeds.items()},
                "mean": plain(Difference.mean(seeds.values())),
                "standard_error": plain(error) if error else None,
            }
            for setting, seeds in differences.items()
            if seeds
            for error in [Difference.error(seeds.values())]
        },
        "difference_between_bf16_seeds": {
            str(seed): plain(d) for seed, d in between_seeds(runs).items()
        },
    }


def print_tables(runs: Runs, console: Any) -> None:
    """One row a run, then one a setting."""
    from rich.table import Table

    results, differences = by_setting(runs), against_base(runs)
    one = next(iter(runs.values()))
    config = load(one["config"])
    table = Table(title=f"Runs of {config.steps:,} steps, losses in nats per byte")
    for name in ("setting", "seed", "loss, last 1/4", "to BF16", "held out", "to BF16",
                 "tokens/s", "ms/step", "GiB", "experts", "s in all"):  # fmt: skip
        table.add_column(name, justify="left" if name == "setting" else "right")
    for setting, seeds in results.items():
        for seed, r in seeds.items():
            d = differences.get(setting, {}).get(seed)
            table.add_row(
                setting, str(seed), f"{r.train_loss:.5f}", f"{d.train:+.3%}" if d else "-",
                f"{r.valid_loss:.5f}", f"{d.valid:+.3%}" if d else "-", f"{r.tokens_per_s:,.0f}",
                f"{r.step_ms:.1f}", f"{r.memory_bytes / 2**30:.1f}", f"{r.expert_share:.1%}",
                f"{r.seconds:.0f}",
            )  # fmt: skip
    console.print(table)
    _print_settings(runs, console)
    _print_text(one, config, *passes(runs), console)


def _print_settings(runs: Runs, console: Any) -> None:
    from rich.table import Table

    results = by_setting(runs)
    base = results.get(BASE, {})
    title = f"Against BF16 of the same seed, mean over seeds ± standard error; bar {TOLERANCE:.2%}"
    table = Table(title=title)
    for name in ("setting", "seeds", "loss, last 1/4", "", "largest", "held out", "", "speed"):
        table.add_column(name, justify="right" if name else "left")
    for setting, seeds in against_base(runs).items():
        if not seeds:
            continue
        mean, error = Difference.mean(seeds.values()), Difference.error(seeds.values())
        train, valid = f"{mean.train:+.3%}", f"{mean.valid:+.3%}"
        if error:
            train, valid = f"{train} ± {error.train:.3%}", f"{valid} ± {error.valid:.3%}"
        largest = max((d.train for d in seeds.values()), key=abs)
        speed = statistics.fmean(
            results[setting][s].tokens_per_s / base[s].tokens_per_s for s in seeds
        )
        table.add_row(
            setting, ", ".join(map(str, seeds)), train, _verdict(mean.train),
            f"{largest:+.3%}", valid, _verdict(mean.valid), f"{speed:.2f}x",
        )  # fmt: skip
    for seed, d in between_seeds(runs).items():
        row = f"BF16, seed {seed} to {next(iter(base))}"
        table.add_row(row, "", f"{d.train:+.3%}", "chance", "", f"{d.valid:+.3%}", "chance", "")
    console.print(table)


def _verdict(difference: float) -> str:
    return "within" if abs(difference) <= TOLERANCE else "OUTSIDE"


def _print_text(
    one: Mapping[str, Any], config: Config, before: float, end: float, console: Any
) -> None:
    read = config.steps * config.tokens_per_step
    console.print(
        "A seed draws the weights and the order of the text; all settings of a seed begin with the "
        "same weights (bf16-nudged: but for a thousandth) and read the same batches. The standard "
        "error of two seeds is itself a guess.\n"
        f"{read:,} bytes read of {one['data']['train_bytes']:,} ({one['data']['source']}): "
        f"{end:.2f} passes, of which the last quarter of the steps {before:.2f} to {end:.2f}. "
        "Held-out text is never learned.\n"
        f"Step times exclude start-up, validation and logging. {one['device']}, torch "
        f"{one['versions']['torch']}.",
        soft_wrap=True,
    )


def draw(runs: Runs, path: Path) -> None:
    """Writes the picture: losses, and their difference to BF16 of the same seed.

    A thin line for each seed, a thick one for the mean of a setting's seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5.5), dpi=110, layout="constrained")
    # What is drawn later covers what came before: BF16 settings first.
    ordered = sorted(
        runs.values(),
        key=lambda r: (not r["setting"].startswith(BASE), r["setting"] != BASE, r["seed"]),
    )
    base = {r["seed"]: r["loss"] for r in ordered if r["setting"] == BASE}
    steps = max(len(r["loss"]) for r in ordered)
    for setting in dict.fromkeys(r["setting"] for r in ordered):
        several = [r for r in ordered if r["setting"] == setting]
        color = COLORS.get(setting, "black")
        _lines(left, setting, color, [r["loss"] for r in several], max(1, steps // 50))
        for one in several:
            left.plot(*zip(*one["valid"], strict=True), "x", color=color, markersize=4)
        percent = [
            [100 * relative(a, b) for a, b in zip(one["loss"], base[one["seed"]], strict=False)]
            for one in several
            if one["seed"] in base and setting != BASE
        ]
        _lines(right, setting, color, percent, max(1, steps // 20))
    left.set_title("Loss, running mean (lines) and held out (crosses)")
    left.set_ylabel("nats per byte")
    ends = [r["loss"][-1] for r in ordered]
    starts = [r["loss"][len(r["loss"]) // 10] for r in ordered]
    left.set_ylim(0.8 * min(ends), 1.1 * max(starts))
    _bar(right, steps)
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper right")
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, format="png")
    pyplot.close(figure)
    partial.replace(path)


def _lines(axis: Any, setting: str, color: str, curves: list[list[float]], span: int) -> None:
    """Running means over `span` steps: thin, and their mean, as far as all go, with the label."""
    if not curves:
        return
    for curve in curves if len(curves) > 1 else ():
        axis.plot(smooth(curve, span), color=color, linewidth=0.6, alpha=0.45)
    mean = [statistics.fmean(values) for values in zip(*curves, strict=False)]
    seeds = f"{len(curves)} seed" + ("s" if len(curves) > 1 else "")
    axis.plot(smooth(mean, span), color=color, linewidth=2, label=f"{setting}, {seeds}")


def _bar(axis: Any, steps: int) -> None:
    axis.set_title(f"Training loss relative to BF16 of the same seed, mean of {steps // 20} steps")
    bar = 100 * TOLERANCE
    axis.axhspan(-bar, bar, color="green", alpha=0.12, label=f"±{TOLERANCE:.2%}")
    axis.axvline(steps - steps // 4, color="gray", linewidth=0.8, label="last quarter")
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_ylim(-6 * bar, 6 * bar)
    axis.set_ylabel("%")
