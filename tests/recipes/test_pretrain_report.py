"""The closing table and the picture, from records alone."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from recipes.pretrain import metrics, report
from recipes.pretrain.config import Config

CONFIG = Config(steps=40, warmup_steps=4, experts=4, layers=2)


def _records(gap: float = 0.001, models: tuple[str, ...] = ("bf16", "fp8")) -> list[dict]:
    records: list[dict] = []
    for model in models:
        for step in range(40):
            loss = (3.0 - 0.02 * step) * (1 + gap * (model == "fp8"))
            norm = math.inf if step == 3 and model == "fp8" else 1.0
            records.append(
                {"kind": metrics.TRAIN, "step": step, "model": model, "loss": loss,
                 "balance_loss": 0.01, "grad_norm": norm, "lr": 1e-3}
            )  # fmt: skip
        for i, step in enumerate((9, 19, 29, 39)):
            records.append(
                {"kind": metrics.SPEED, "step": step, "model": model, "step_ms": 900.0 if i == 0
                 else 100.0, "tokens_per_s": 1e4 * (1 + (model == "fp8")), "memory_bytes": i << 30}
            )  # fmt: skip
            share = [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]]
            records.append({"kind": metrics.LOAD, "step": step, "model": model, "share": share})
            records.append({"kind": metrics.VALID, "step": step, "model": model, "loss": 2.5})
            if model == "fp8":
                tensors = {"x": {"flushed": 0.01, "saturated": 0.0}}
                records.append(
                    {"kind": metrics.VALUES, "step": step, "model": model, "tensors": tensors}
                )
        records.append({"kind": metrics.PROFILE, "model": model, "expert_share": 0.4})
    return records


def _table(records: list[dict], config: Config = CONFIG) -> str:
    out = io.StringIO()
    report.print_table(records, config, 3.2, Console(file=out, width=100))
    return out.getvalue()


def test_outcome() -> None:
    found = report.outcome(_records(), "fp8")
    assert found.steps == 40
    assert found.train_loss == pytest.approx((3.0 - 0.02 * 34.5) * 1.001)
    assert found.valid_loss == 2.5
    assert found.step_ms == 100.0  # the first read, with what is done once, is left out
    assert found.memory_bytes == 3 << 30
    assert found.expert_share == 0.4
    assert found.skipped == 1


def test_difference_is_relative_and_over_the_last_quarter() -> None:
    assert report.final_difference(_records(0.001)) == pytest.approx(0.001)
    assert report.final_difference(_records(models=("fp8",))) is None
    steps, differences = report.relative_difference(_records(-0.02))
    assert steps == list(range(40))
    assert differences == pytest.approx([-0.02] * 40)


@pytest.mark.parametrize(("gap", "verdict"), [(0.002, "within"), (0.003, "OUTSIDE")])
def test_table_judges_the_difference(gap: float, verdict: str) -> None:
    text = _table(_records(gap))
    assert f"{gap:+.3%} ({verdict} the bar of 0.25%)" in text
    assert "2.00x" in text
    assert "in a run this short" in text


def test_table_has_every_figure() -> None:
    text = _table(_records())
    for label in ("validation loss", "entropy of single bytes", "tokens/s", "GiB", "40.0%", "3.2"):
        assert label in text


def test_table_of_one_model_and_of_none_yet() -> None:
    alone = Config(steps=40, warmup_steps=4, model="fp8")
    assert "against" not in _table(_records(models=("fp8",)), alone)
    assert "nan" in _table([], alone)


@pytest.mark.parametrize("case", ["both", "fp8", "bf16", "empty"])
def test_picture(tmp_path: Path, case: str) -> None:
    model = "both" if case == "empty" else case
    config = Config(steps=40, warmup_steps=4, experts=4, layers=2, model=model)
    records = [] if case == "empty" else _records(models=config.twins)
    path = tmp_path / report.PICTURE
    report.draw(records, config, 3.2, "a run", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 300_000
    assert [p.name for p in tmp_path.iterdir()] == [report.PICTURE]
