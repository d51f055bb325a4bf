"""The proof: its runs through the command line, its figures against a recomputation."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from recipes.pretrain import metrics, proof_report
from recipes.pretrain.model import Block, LanguageModel
from recipes.pretrain.parallel import Ranks
from recipes.pretrain.proof import PICTURE, PROOF, jobs, main
from recipes.pretrain.twin import Twin

ROOT = Path(__file__).parents[2]
STEPS = 32
RECIPE = [
    "--layers", "1", "--d-model", "128", "--heads", "2", "--experts", "4", "--seq-len", "64",
    "--batch-size", "4", "--warmup-steps", "4", "--lr", "4e-3", "--eval-batches", "2",
    "--valid-fraction", "0.1",
]  # fmt: skip


def _words(out: Path, text: Path, *more: str) -> list[str]:
    ours = ["--out", str(out), "--preset", "cpu", "--steps", str(STEPS), *more]
    return [*ours, "--", *RECIPE, "--data", str(text)]


def _start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.pretrain.proof", *words],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _finish(words: list[str], code: int = 0) -> str:
    process = _start(words)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


TWO = ("--settings", "bf16", "fp8", "--seeds", "0", "1")


@pytest.fixture(scope="module")
def out(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings of two seeds, two runs side by side."""
    folder = tmp_path_factory.mktemp("proof")
    output = _finish(_words(folder, text, *TWO, "--gpus", "2"))
    assert "4 runs to do, 0 done before" in output
    assert output.count(" begins on device ") == output.count(" done in ") == 4
    # Longest first.
    assert output.index("bf16-s1 begins") < output.index("fp8-s0 begins")
    return folder


def _losses(out: Path, name: str, kind: str) -> list[float]:
    records = metrics.read(out / "runs" / name)
    return [r["loss"] for r in metrics.of_kind(records, kind)]


def _proof(out: Path) -> dict[str, Any]:
    return json.loads((out / PROOF).read_text(encoding="utf-8"))


def test_figures_are_those_of_the_runs(out: Path) -> None:
    proof = _proof(out)
    names = ["bf16-s0", "bf16-s1", "fp8-s0", "fp8-s1"]
    assert sorted(proof["runs"]) == names
    train, valid = {}, {}
    for name in names:
        losses = _losses(out, name, metrics.TRAIN)
        assert proof["runs"][name]["loss"] == pytest.approx(losses, abs=1e-6)
        assert len(losses) == STEPS
        train[name] = statistics.fmean(losses[-STEPS // 4 :])
        valid[name] = _losses(out, name, metrics.VALID)[-1]
    for one in proof["summary"]["runs"]:
        name = f"{one['setting']}-s{one['seed']}"
        assert one["train_loss"] == pytest.approx(train[name], abs=2e-6)
        assert one["valid_loss"] == pytest.approx(valid[name], abs=2e-6)
        assert one["tokens_per_s"] > 0 and 0 < one["expert_share"] < 1
    found = proof["summary"]["difference_to_bf16"]["fp8"]
    expected = [train[f"fp8-s{s}"] / train[f"bf16-s{s}"] - 1 for s in (0, 1)]
    assert [found["seeds"][s]["train"] for s in ("0", "1")] == pytest.approx(expected, abs=2e-6)
    assert found["mean"]["train"] == pytest.approx(statistics.fmean(expected), abs=2e-6)
    between = proof["summary"]["difference_between_bf16_seeds"]["1"]
    assert between["valid"] == pytest.approx(valid["bf16-s1"] / valid["bf16-s0"] - 1, abs=2e-6)
    # The precisions do differ, and a seed differs more: other weights, other batches.
    assert expected[0] != 0 and abs(expected[0]) < abs(between["train"])


def test_settings_are_what_they_are_called(out: Path) -> None:
    runs = _proof(out)["runs"]
    assert runs["bf16-s0"]["config"]["model"] == "bf16"
    fp8 = runs["fp8-s1"]["config"]
    assert (fp8["model"], fp8["save"], fp8["pow2_scales"], fp8["seed"]) == ("fp8", "fp8", True, 1)
    assert (
        set(runs["fp8-s1"]["fp8_values"]) >= {"x", "dy"} and runs["bf16-s0"]["fp8_values"] is None
    )


def _model(setting: str, seed: int = 0) -> LanguageModel:
    (job,) = jobs([setting], [seed], "cpu", STEPS, RECIPE)
    return Twin(*job.config.twins, job.config, Ranks()).model


@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_one_gemm_in_fp8(gemm: str) -> None:
    block = _model(f"fp8-{gemm}").blocks[0]
    assert isinstance(block, Block)
    others = {"fprop", "dgrad", "wgrad"} - {gemm}
    config = block.moe.experts.config
    assert getattr(config, gemm) == "fp8" and {getattr(config, o) for o in others} == {"bf16"}


def test_nudged_weights_are_the_same_but_for_a_thousandth() -> None:
    plain, nudged, again, other = (
        _model(setting, seed).state_dict()
        for setting, seed in (("bf16", 0), ("bf16-nudged", 0), ("bf16-nudged", 0), ("bf16", 1))
    )
    for name, weight in plain.items():
        assert torch.equal(nudged[name], again[name])
        error = float((nudged[name] - weight).norm() / weight.norm())
        assert 0.5e-3 < error < 1.5e-3, name
    name = "blocks.0.moe.experts.w13"
    assert float((other[name] - plain[name]).norm() / plain[name].norm()) > 1


def test_single_runs_stay_small(out: Path) -> None:
    assert not list(out.glob("runs/*/checkpoints"))
    assert (out / PICTURE).stat().st_size > 10_000
    assert sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) < 4 << 20


def test_finished_runs_are_skipped_and_reported_from_the_file_alone(
    out: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(out / PROOF, tmp_path)
    assert main(_words(tmp_path, text, *TWO)) == 0
    output = capsys.readouterr().out
    assert "0 runs to do, 4 done before" in output and "begins" not in output
    assert _proof(tmp_path) == _proof(out)
    (tmp_path / PICTURE).unlink()
    assert main(["--out", str(tmp_path), "--report-only"]) == 0
    assert (tmp_path / PICTURE).exists()
    loss = _proof(out)["summary"]["runs"][0]["train_loss"]
    assert f"{loss:.5f}" in capsys.readouterr().out


def test_other_settings_are_refused(
    out: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / PROOF).read_bytes()
    assert main([*_words(out, text, *TWO), "--lr", "1e-3"]) == 2
    assert "holds bf16-s0 with lr 0.004, asked for now is 0.001" in capsys.readouterr().err
    assert (out / PROOF).read_bytes() == before
    assert main([*_words(tmp_path / "new", text), "--top-k", "9"]) == 2
    assert "--top-k: expected at most" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "new"), "--report-only"]) == 1
    assert not (tmp_path / "new").exists()


def test_a_failed_run_is_told_and_the_others_go_on(text: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "bf16-s0").mkdir(parents=True)
    (tmp_path / "runs" / "bf16-s0" / "thesis.txt").write_text("precious")
    output = _finish(_words(tmp_path, text, "--settings", "bf16", "fp8", "--seeds", "0"), code=1)
    assert "bf16-s0 FAILED" in output and "exists and is not a run" in output
    assert "missing: bf16-s0; failed: bf16-s0" in output
    assert list(_proof(tmp_path)["runs"]) == ["fp8-s0"]
    assert (tmp_path / "runs" / "bf16-s0" / "thesis.txt").read_text() == "precious"


def test_stopped_and_called_again(out: Path, text: Path, tmp_path: Path) -> None:
    """A run that a stop caught goes on where it was, bit for bit."""
    more = ("--settings", "bf16", "--seeds", "0", "1", "--runs-dir", str(tmp_path / "elsewhere"))
    process = _start(_words(tmp_path, text, *more))
    running = tmp_path / "elsewhere" / "bf16-s0" / "metrics.jsonl"
    while not (running.exists() and running.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as `timeout` does, to the process and to its group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "bf16-s0 stopped after" in output and "bf16-s1 begins" not in output
    assert len(list(tmp_path.glob("elsewhere/bf16-s0/checkpoints/step_*"))) == 1
    output = _finish(_words(tmp_path, text, *more))
    assert "bf16-s0 goes on" in output and "bf16-s1 begins" in output
    for name in ("bf16-s0", "bf16-s1"):
        assert _proof(tmp_path)["runs"][name]["loss"] == _proof(out)["runs"][name]["loss"]
    assert not list(tmp_path.glob("elsewhere/*/checkpoints"))


def _run(setting: str, seed: int, loss: float) -> dict[str, Any]:
    return {
        "setting": setting, "seed": seed, "device": "CPU", "versions": {"torch": "2"},
        "data": {"train_bytes": 2000 * 4 * 32, "source": "text"}, "seconds": 9.0,
        "config": {"steps": 4000, "batch_size": 4, "seq_len": 32}, "tokens_per_s": 100.0,
        "step_ms": 1.0, "memory_bytes": 1 << 30, "expert_share": 0.5,
        "valid": [[2000, 3.0], [4000, 1.1 * loss]], "loss": [5.0] * 3000 + [loss] * 1000,
    }  # fmt: skip


def _tables(runs: dict[str, Any]) -> str:
    file = io.StringIO()
    proof_report.print_tables(runs, Console(file=file, width=150))
    return file.getvalue()


@pytest.mark.parametrize(("gap", "verdict"), [(0.0024, "within"), (-0.0026, "OUTSIDE")])
def test_verdict(gap: float, verdict: str) -> None:
    runs = {
        "a": _run("bf16", 0, 1.0), "b": _run("bf16", 1, 1.01),
        "c": _run("fp8", 0, 1.0 * (1 + gap)), "d": _run("fp8", 1, 1.01 * (1 + gap)),
    }  # fmt: skip
    mean = proof_report.summary(runs)["difference_to_bf16"]["fp8"]["mean"]
    assert mean["train"] == pytest.approx(gap) and mean["valid"] == pytest.approx(gap)
    table = _tables(runs)
    row = next(line for line in table.splitlines() if "0, 1" in line)
    other = {"within", "OUTSIDE"} - {verdict}
    assert row.count(verdict) == 2 and other.pop() not in row  # of the training and held-out losses
    assert row.count(f"{gap:+.3%}") == 3 and row.count("± 0.000%") == 2
    assert "+1.000%" in table  # between the BF16 seeds
    assert "2.00 passes, of which the last quarter of the steps 1.50 to 2.00" in table


def test_standard_error_is_of_the_differences_between_seeds() -> None:
    runs = {
        "a": _run("bf16", 0, 1.0), "b": _run("bf16", 1, 2.0), "c": _run("bf16", 2, 4.0),
        "d": _run("fp8", 0, 1.01), "e": _run("fp8", 1, 2.0), "f": _run("fp8", 2, 3.96),
        "g": _run("fp8-no-pow2", 0, 1.01),
    }  # fmt: skip
    found = proof_report.summary(runs)["difference_to_bf16"]
    # Of +1, 0 and -1 %.
    assert found["fp8"]["mean"]["train"] == pytest.approx(0, abs=1e-12)
    assert found["fp8"]["standard_error"]["train"] == pytest.approx(0.01 / 3**0.5)
    assert found["fp8-no-pow2"]["standard_error"] is None
    assert "± 0.577%" in _tables(runs)


def test_without_its_bf16_run_a_run_is_held_against_none() -> None:
    runs = {"a": _run("bf16", 0, 1.0), "c": _run("fp8", 1, 1.0)}
    assert proof_report.against_base(runs) == {"fp8": {}}
    assert "within" not in _tables(runs)


def test_picture_has_a_line_for_each_seed_and_one_for_their_mean() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    curves = [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0, 6.0]]
    proof_report._lines(axis, "fp8", "red", curves, span=1)
    *thin, thick = axis.lines
    assert [list(line.get_ydata()) for line in thin] == curves
    assert list(thick.get_ydata()) == [2.0, 3.0, 4.0]
    assert thick.get_label() == "fp8, 2 seeds"
    assert all(line.get_linewidth() < thick.get_linewidth() for line in thin)
    proof_report._lines(axis, "bf16", "blue", [], span=1)
    proof_report._lines(axis, "bf16", "blue", curves[:1], span=1)
    assert [line.get_label() for line in axis.lines[3:]] == ["bf16, 1 seed"]
    pyplot.close(figure)
