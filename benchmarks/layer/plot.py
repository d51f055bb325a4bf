"""Where the time of a step goes: one stacked bar per layer and shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLASSES = {
    "GEMM": ("gemm", "cutlass", "nvjet", "xmma"),
    "SwiGLU": ("swiglu", "silu"),
    "permute": ("permute", "route"),
    "cast": ("cast", "transpose_per_block"),
    "combine": ("gather_sum", "gather_slots"),
    "between kernels": ("between kernels",),
}
"""Class of a kernel: the first whose pattern its name contains; else "other"."""

_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#c0c0c0", "#da8bc3")


def class_of(op: str) -> str:
    lowered = op.lower()
    for name, patterns in CLASSES.items():
        if any(pattern in lowered for pattern in patterns):
            return name
    return "other"


def totals(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """ms by class for each (shape, layer), from the rows of the part "kernels"."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["part"] == "kernels" and "us" in row:
            bar = found.setdefault((row["shape"], row["layer"]), {})
            kind = class_of(row["op"])
            bar[kind] = bar.get(kind, 0.0) + row["us"] / 1e3
    return found


def save(rows: list[dict[str, Any]], path: str) -> None:
    """Writes the picture.

    Raises: ValueError when there are no kernel times; RuntimeError without matplotlib.
    """
    bars = totals(rows)
    if not bars:
        raise ValueError("plot: expected rows of the part 'kernels' with times, got none")
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plot: expected matplotlib (pip install 'fp8moe[train]')") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(bars) + 1.6), layout="constrained")
    left = [0.0] * len(bars)
    for kind, color in zip((*CLASSES, "other"), _COLORS, strict=True):
        width = [bar.get(kind, 0.0) for bar in bars.values()]
        if any(width):
            axes.barh(range(len(bars)), width, left=left, color=color, label=kind)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{shape}  {layer}" for shape, layer in bars])
    axes.invert_yaxis()
    axes.set_xlabel("ms, forward + backward")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
