"""The picture and the closing table of a run, drawn from its metrics file alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config
from .data import nats_to_bits
from .metrics import LOAD, PROFILE, SPEED, TRAIN, VALID, VALUES, of_kind, smooth

PICTURE = "report.png"
TOLERANCE = 0.0025  # of the BF16 loss: how far an FP8 run may end from its twin (DeepSeek-V3's bar)
# Below this the twins' difference is mostly chance. Measured with the cpu preset: two BF16 models,
# one with its first weights perturbed by 0.1 %, ended +0.54 % apart (-0.35 % at 1.5 x the rate).
SETTLED_STEPS = 1000
COLORS = {"bf16": "#4477aa", "fp8": "#ee6677"}
NAMES = {"bf16": "BF16", "fp8": "FP8"}

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """One twin at the end of a run. Losses are nats per byte."""

    model: str
    steps: int
    train_loss: float  # mean over the last quarter of the steps
    valid_loss: float | None
    tokens_per_s: float | None  # median
    step_ms: float | None  # median
    memory_bytes: int | None  # largest
    expert_share: float | None  # of the time of forward and backward
    skipped: int  # updates left out because a gradient was not finite


def series(records: Records, kind: str, model: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one scalar."""
    found = [(r["step"], r[name]) for r in of_kind(records, kind, model)]
    return [step for step, _ in found], [value for _, value in found]


def last_quarter(values: Sequence[float]) -> list[float]:
    return list(values[len(values) - max(1, len(values) // 4) :])


def outcome(records: Records, model: str) -> Outcome:
    steps, losses = series(records, TRAIN, model, "loss")
    norms = series(records, TRAIN, model, "grad_norm")[1]
    valid = series(records, VALID, model, "loss")[1]
    speeds = list(of_kind(records, SPEED, model))
    # The first read includes what is done once: compiling kernels, filling caches.
    settled = speeds[1:] or speeds
    shares = [r["expert_share"] for r in of_kind(records, PROFILE, model)]
    return Outcome(
        model=model,
        steps=len(steps),
        train_loss=statistics.fmean(last_quarter(losses)) if losses else math.nan,
        valid_loss=valid[-1] if valid else None,
        tokens_per_s=statistics.median(r["tokens_per_s"] for r in settled) if settled else None,
        step_ms=statistics.median(r["step_ms"] for r in settled) if settled else None,
        memory_bytes=max(r["memory_bytes"] for r in speeds) if speeds else None,
        expert_share=shares[-1] if shares else None,
        skipped=sum(not math.isfinite(norm) for norm in norms),
    )


def relative_difference(records: Records) -> tuple[list[int], list[float]]:
    """(FP8 - BF16) / BF16 of the training loss, step by step."""
    steps, base = series(records, TRAIN, "bf16", "loss")
    other = dict(zip(*series(records, TRAIN, "fp8", "loss"), strict=True))
    common = [(s, (other[s] - b) / b) for s, b in zip(steps, base, strict=True) if s in other]
    return [s for s, _ in common], [d for _, d in common]


def final_difference(records: Records) -> float | None:
    """Mean relative difference of the twins' losses over the last quarter, None for one model."""
    differences = relative_difference(records)[1]
    return statistics.fmean(last_quarter(differences)) if differences else None


def print_table(records: Records, config: Config, entropy: float, console: Any) -> None:
    """The closing table."""
    from rich.table import Table

    outcomes = [outcome(records, model) for model in config.twins]
    table = Table(title="Pretraining, in nats per byte unless noted", title_justify="left")
    table.add_column("")
    for one in outcomes:
        table.add_column(NAMES[one.model], justify="right")

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    row("steps", [str(one.steps) for one in outcomes])
    row("training loss, last quarter", [f"{one.train_loss:.4f}" for one in outcomes])
    row("  in bits per byte", [f"{nats_to_bits(one.train_loss):.4f}" for one in outcomes])
    row("validation loss", [_number(one.valid_loss, "{:.4f}") for one in outcomes])
    row("entropy of single bytes", [f"{entropy:.4f}"] * len(outcomes))
    row("tokens/s", [_number(one.tokens_per_s, "{:,.0f}") for one in outcomes])
    row("ms/step", [_number(one.step_ms, "{:,.1f}") for one in outcomes])
    row(_memory_label(config), [_gib(one.memory_bytes) for one in outcomes])
    row("experts, of forward + backward", [_number(one.expert_share, "{:.1%}") for one in outcomes])
    row("updates skipped", [str(one.skipped) for one in outcomes])
    console.print(table)
    difference = final_difference(records)
    if difference is not None:
        verdict = "within" if abs(difference) <= TOLERANCE else "OUTSIDE"
        console.print(
            f"FP8 loss against BF16, last quarter: {difference:+.3%} "
            f"({verdict} the bar of {TOLERANCE:.2%})"
        )
        if config.steps < SETTLED_STEPS:
            console.print(
                "  Much of it is chance in a run this short: with the cpu preset, two BF16 models "
                "whose first weights differed by 0.1% ended 0.5% apart.",
                soft_wrap=True,
            )
        bf16, fp8 = outcomes
        if bf16.tokens_per_s and fp8.tokens_per_s:
            console.print(f"FP8 speed against BF16: {fp8.tokens_per_s / bf16.tokens_per_s:.2f}x")


def _memory_label(config: Config) -> str:
    return "memory, GiB" if config.device == "cuda" else "memory of the process, GiB"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f}"


def draw(records: Records, config: Config, entropy: float, title: str, path: Path) -> None:
    """Writes the six-panel picture of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), dpi=100, layout="constrained")
    _draw_loss(axes[0, 0], records, config, entropy)
    _draw_difference(axes[0, 1], records, config)
    _draw_values(axes[0, 2], records)
    _draw_speed(axes[1, 0], records, config)
    _draw_memory(axes[1, 1], records, config)
    _draw_load(figure, axes[1, 2], records, config)
    figure.suptitle(title)
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, format="png")
    pyplot.close(figure)
    partial.replace(path)


def _span(config: Config) -> int:
    return max(1, config.steps // 50)


def _nothing(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="gray")
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_loss(axis: Any, records: Records, config: Config, entropy: float) -> None:
    axis.set_title("Loss")
    for model in config.twins:
        steps, losses = series(records, TRAIN, model, "loss")
        # The dashes keep the lower curve in sight where the two coincide.
        style = "--" if model == "fp8" and len(config.twins) == 2 else "-"
        axis.plot(
            steps, smooth(losses, _span(config)), style, color=COLORS[model],
            label=f"{NAMES[model]} training",
        )  # fmt: skip
        axis.plot(
            *series(records, VALID, model, "loss"), "o" if model == "bf16" else "x",
            color=COLORS[model], label=f"{NAMES[model]} validation",
        )  # fmt: skip
    axis.axhline(entropy, color="gray", linestyle=":", label="entropy of single bytes")
    axis.set_xlabel("step")
    axis.set_ylabel("nats per byte")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_difference(axis: Any, records: Records, config: Config) -> None:
    axis.set_title("Loss of FP8 relative to BF16")
    steps, differences = relative_difference(records)
    if not steps:
        _nothing(axis, "needs both twins (--model both)")
        return
    percent = [100 * value for value in differences]
    axis.plot(steps, percent, color="lightgray", label="each step")
    axis.plot(steps, smooth(percent, _span(config)), color=COLORS["fp8"], label="running mean")
    axis.axhspan(
        -100 * TOLERANCE, 100 * TOLERANCE, color="green", alpha=0.12, label=f"±{TOLERANCE:.2%}"
    )
    axis.axhline(0, color="gray", linewidth=0.8)
    reach = max(4 * 100 * TOLERANCE, 1.3 * max((abs(v) for v in percent), default=0))
    axis.set_ylim(-min(reach, 5), min(reach, 5))
    axis.set_xlabel("step")
    axis.set_ylabel("%")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_speed(axis: Any, records: Records, config: Config) -> None:
    axis.set_title("Speed")
    for model in config.twins:
        steps, speeds = series(records, SPEED, model, "tokens_per_s")
        axis.plot(steps, speeds, color=COLORS[model], label=NAMES[model])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("tokens/s")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_memory(axis: Any, records: Records, config: Config) -> None:
    axis.set_title(
        "Peak memory of a twin's step" if config.device == "cuda" else "Memory of the process"
    )
    for model in config.twins:
        steps, sizes = series(records, SPEED, model, "memory_bytes")
        axis.plot(steps, [s / 2**30 for s in sizes], color=COLORS[model], label=NAMES[model])
    axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
    axis.set_xlabel("step")
    axis.set_ylabel("GiB")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_load(figure: Any, axis: Any, records: Records, config: Config) -> None:
    model = config.twins[-1]
    axis.set_title(f"Load of the experts ({NAMES[model]}), 1 = even")
    found = list(of_kind(records, LOAD, model))
    if not found:
        _nothing(axis, "no load was recorded")
        return
    columns = [[share * len(layer) for layer in r["share"] for share in layer] for r in found]
    rows = list(map(list, zip(*columns, strict=True)))
    steps = [r["step"] for r in found]
    width = steps[0] if len(steps) < 2 else steps[1] - steps[0]
    image = axis.imshow(
        rows, aspect="auto", origin="lower", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2,
        extent=(steps[0] - width, steps[-1], 0, len(rows)),
    )  # fmt: skip
    layers = len(found[0]["share"])
    for boundary in range(1, layers):
        axis.axhline(boundary * config.experts, color="black", linewidth=0.8)
    axis.set_yticks(
        [(layer + 0.5) * config.experts for layer in range(layers)],
        [f"layer {layer}" for layer in range(layers)],
    )
    axis.set_xlabel("step")
    figure.colorbar(image, ax=axis)


def _draw_values(axis: Any, records: Records) -> None:
    axis.set_title("FP8 values flushed to zero (solid) or at 448 (dotted)")
    found = list(of_kind(records, VALUES))
    if not found:
        _nothing(axis, "no FP8 values were observed")
        return
    from matplotlib import colormaps

    kinds = sorted({kind for r in found for kind in r["tensors"]})
    for i, kind in enumerate(kinds):
        have = [r for r in found if kind in r["tensors"]]
        steps = [r["step"] for r in have]
        for name, style in (("flushed", "-"), ("saturated", ":")):
            axis.plot(
                steps, [100 * r["tensors"][kind][name] for r in have], style,
                color=colormaps["tab10"](i % 10), label=kind if name == "flushed" else None,
            )  # fmt: skip
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.set_ylim(0, 100 * max(1e-2, axis.get_ylim()[1]))  # room for the legend
    axis.set_xlabel("step")
    axis.set_ylabel("% of the values")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper center", ncols=3)
