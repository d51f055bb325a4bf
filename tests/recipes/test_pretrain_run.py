"""Whole runs of the recipe: to the end, killed and resumed, stopped, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from recipes.pretrain import checkpoint, metrics
from recipes.pretrain.cli import main, make_deterministic
from recipes.pretrain.config import Config
from recipes.pretrain.data import load_corpus
from recipes.pretrain.stop import StopRequest
from recipes.pretrain.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = {
    "layers": 2, "d_model": 128, "heads": 2, "experts": 4, "d_expert": 128, "seq_len": 64,
    "batch_size": 4, "steps": 40, "warmup_steps": 6, "lr": 4e-3, "log_every": 3, "eval_every": 20,
    "eval_batches": 1, "checkpoint_every": 6, "observe_every": 10, "sample_bytes": 8,
    "valid_fraction": 0.1,
}  # fmt: skip
FINISHED = "step_0000040"


def _arguments(text: Path, runs: Path, name: str, /, *more: str, **changes: object) -> list[str]:
    words = ["--runs-dir", str(runs), "--name", name, "--data", str(text), "--preset", "cpu"]
    for key, value in {**TINY, **changes}.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return [*words, *more]


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.pretrain", *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _finish(arguments: list[str]) -> str:
    process = _start(arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def _stop_when(wanted: Path, arguments: list[str], number: signal.Signals) -> int:
    """Starts a run and sends it a signal as soon as a path exists."""
    process = _start(arguments)
    while not wanted.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert "picture:" not in output, "it ended before the signal came"
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM" in output
    return process.returncode


@dataclass(frozen=True)
class Run:
    folder: Path
    output: str


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    runs = tmp_path_factory.mktemp("runs")
    return Run(runs / "whole", _finish(_arguments(text, runs, "whole")))


def _repeatable(folder: Path, *left_out: str) -> list[dict]:
    skip = (metrics.SPEED, metrics.PROFILE, *left_out)
    return [r for r in metrics.read(folder) if r["kind"] not in skip]


def _assert_same_end(one: Path, two: Path) -> None:
    for name in ("bf16.model", "fp8.model", "bf16.optimizer", "fp8.optimizer", "random"):
        saved = [checkpoint.latest(folder / "checkpoints") for folder in (one, two)]
        assert saved[0] is not None and saved[1] is not None
        assert saved[0].path.name == saved[1].path.name == FINISHED
        a, b = saved[0].tensors(name), saved[1].tensors(name)
        assert a.keys() == b.keys() and a
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"


def test_a_run_learns_and_reports(whole: Run, text: Path) -> None:
    records = metrics.read(whole.folder)
    settings = json.loads((whole.folder / "config.json").read_text())
    entropy = settings["data"]["unigram_entropy"]
    assert settings["data"]["bytes"] == sum(f.stat().st_size for f in text.iterdir())
    assert len(settings["data"]["sha256"]) == 64
    for model in ("bf16", "fp8"):
        losses = [r["loss"] for r in metrics.of_kind(records, metrics.TRAIN, model)]
        assert len(losses) == 40
        assert sum(losses[-10:]) / 10 < entropy - 0.1
        assert [r["step"] for r in metrics.of_kind(records, metrics.VALID, model)] == [20, 40]
        (profile,) = metrics.of_kind(records, metrics.PROFILE, model)
        assert 0 < profile["expert_share"] < 1
        load = [r["share"] for r in metrics.of_kind(records, metrics.LOAD, model)]
        assert all(abs(sum(layer) - 1) < 1e-9 for share in load for layer in share)
    kinds = {k for r in metrics.of_kind(records, metrics.VALUES) for k in r["tensors"]}
    assert kinds == {"x", "w13", "act", "w2", "dy", "dh"}
    assert (whole.folder / "report.png").stat().st_size > 10_000
    assert list((whole.folder / "tensorboard").glob("events*"))
    for part in ("FP8 loss against BF16", "training loss, last quarter", "FP8 writes", "tokens/s"):
        assert part in whole.output
    assert sorted(p.name for p in (whole.folder / "checkpoints").iterdir()) == [
        "step_0000036", FINISHED,
    ]  # fmt: skip


def test_killed_and_resumed_is_the_same_run(whole: Run, text: Path, tmp_path: Path) -> None:
    arguments = _arguments(text, tmp_path, "killed")
    folder = tmp_path / "killed"
    again = ["--runs-dir", str(tmp_path), "--name", "killed", "--resume"]
    # Before its first checkpoint, then between two.
    killed = -signal.SIGKILL
    assert _stop_when(folder / "metrics.jsonl", arguments, signal.SIGKILL) == killed
    assert not list(folder.glob("checkpoints/step_*"))
    middle = folder / "checkpoints" / "step_0000018"
    assert _stop_when(middle, again, signal.SIGKILL) == killed
    output = _finish(again)
    assert "resumed at step" in output
    _assert_same_end(whole.folder, folder)
    assert _repeatable(folder) == _repeatable(whole.folder)
    assert (folder / "report.png").exists()


def test_stopped_and_resumed_is_the_same_run(whole: Run, text: Path, tmp_path: Path) -> None:
    arguments = _arguments(text, tmp_path, "stopped")
    folder = tmp_path / "stopped"
    wanted = folder / "checkpoints" / "step_0000012"
    assert _stop_when(wanted, arguments, signal.SIGTERM) == 128 + signal.SIGTERM
    _finish(["--runs-dir", str(tmp_path), "--name", "stopped", "--resume"])
    _assert_same_end(whole.folder, folder)
    # A request to stop adds a read of the device's counters, so those come in other portions.
    counted = (metrics.LOAD, metrics.VALUES)
    ours, theirs = (_repeatable(path, *counted) for path in (folder, whole.folder))
    assert sorted(map(str, ours)) == sorted(map(str, theirs))


@pytest.mark.gpu
def test_killed_and_resumed_on_the_gpu(text: Path, tmp_path: Path) -> None:
    _finish(_arguments(text, tmp_path, "whole", device="cuda"))
    folder = tmp_path / "killed"
    wanted = folder / "checkpoints" / "step_0000012"
    arguments = _arguments(text, tmp_path, "killed", device="cuda")
    assert _stop_when(wanted, arguments, signal.SIGKILL) == -signal.SIGKILL
    _finish(["--runs-dir", str(tmp_path), "--name", "killed", "--resume"])
    _assert_same_end(tmp_path / "whole", folder)
    assert _repeatable(folder) == _repeatable(tmp_path / "whole")


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _losses(model: str, text: Path, folder: Path, device: torch.device) -> dict[str, list[float]]:
    config = Config(
        **{**TINY, "steps": 4, "warmup_steps": 1, "grad_accumulation": 2},
        model=model, data=str(text), device=device.type,
    )  # fmt: skip
    folder.mkdir()
    trainer = Trainer(config, load_corpus(config))
    log = metrics.Metrics(folder)
    assert trainer.train(folder / "checkpoints", log, StopRequest())
    log.close()
    found = metrics.read(folder)
    return {
        twin: [r["loss"] for r in metrics.of_kind(found, metrics.TRAIN, twin)]
        for twin in config.twins
    }


@pytest.mark.usefixtures("deterministic")
def test_a_twin_alone_is_the_twin_in_company(
    text: Path, tmp_path: Path, device: torch.device
) -> None:
    """Same weights, same batches, and no trace of the other model."""
    both = _losses("both", text, tmp_path / "both", device)
    for model in ("bf16", "fp8"):
        assert _losses(model, text, tmp_path / model, device)[model] == both[model]
    # The control: the two precisions do differ, and begin close to each other.
    assert both["bf16"] != both["fp8"]
    assert both["fp8"][0] == pytest.approx(both["bf16"][0], rel=2e-3)


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "/no/such/folder"}, "--data: no such file or folder: /no/such/folder"),
        ({"seq_len": 1 << 20}, "too little text for training"),
        ({"top_k": 5}, "--top-k: expected at most --experts (4), got 5"),
        ({"preset": "tpu"}, "--preset: expected one of cpu, h100, got tpu"),
        ({"name": "../x"}, "--name: expected letters"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    assert message in _refused(_arguments(text, tmp_path / "runs", "x", **changes), capsys)
    assert list(tmp_path.iterdir()) == []


def test_resume_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs-dir", str(tmp_path), "--resume"]
    assert "holds no run" in _refused([*runs, "--name", "x"], capsys)
    assert "expected --name" in _refused(runs, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "holds a run already: continue it with --resume"),
        (["--resume", "--lr", "1"], "the run began with --lr 0.004, got 1.0"),
        (["--resume", "--preset", "h100"], "the run began with --preset cpu, got h100"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_a_run_is_not_touched_by_a_wrong_request(
    whole: Run, text: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*")}
    arguments = ["--runs-dir", str(whole.folder.parent), "--name", "whole", *more]
    if not more:
        arguments += ["--data", str(text)]
    assert message in _refused(arguments, capsys)
    assert {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*")} == before


@pytest.mark.usefixtures("deterministic")
def test_changed_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "text.txt"
    data.write_bytes(b"some text, " * 1000)
    arguments = _arguments(data, tmp_path / "runs", "x", steps=2, warmup_steps=1, model="bf16")
    assert main(arguments) == 0
    data.write_bytes(b"some other, " * 1000)
    again = ["--runs-dir", str(tmp_path / "runs"), "--name", "x", "--resume"]
    assert "the text has changed since the run began" in _refused(again, capsys)


def test_a_folder_that_is_no_run_is_never_replaced(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    arguments = _arguments(text, tmp_path, "mine", "--overwrite")
    assert "exists and is not a run" in _refused(arguments, capsys)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
