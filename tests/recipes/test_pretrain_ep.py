"""The recipe with two processes that share batches and experts, against one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recipes.pretrain import metrics
from recipes.pretrain.cli import main
from recipes.pretrain.compare import compare
from recipes.pretrain.compare import main as compare_main
from recipes.pretrain.config import UserError

ROOT = Path(__file__).parents[2]
TINY = {
    "model": "fp8", "layers": 2, "d_model": 128, "heads": 2, "experts": 4, "d_expert": 128,
    "seq_len": 64, "batch_size": 4, "steps": 36, "warmup_steps": 6, "lr": 2e-3, "log_every": 3,
    "eval_every": 18, "eval_batches": 1, "checkpoint_every": 4, "keep": 3, "observe_every": 8,
    "sample_bytes": 2, "valid_fraction": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    source = Path(torch.__file__).parent / "nn" / "modules"
    for file in sorted(source.glob("*.py"))[:20]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def arguments(text: Path, name: str, /, *more: str, **changes: object) -> list[str]:
    words = ["--runs-dir", str(text.parent / f"runs-{text.name}"), "--name", name, "--data"]
    words += [str(text), "--preset", "cpu"]
    for key, value in {**TINY, **changes}.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return [*words, *more]


def run_folder(text: Path, name: str) -> Path:
    return text.parent / f"runs-{text.name}" / name


def start(words: list[str]) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*torchrun, "-m", "recipes.pretrain", *words, "--ep", "2"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture(scope="module")
def two(text: Path) -> Iterator[Path]:
    """A run of two processes: stopped by a signal after its first checkpoint, then resumed."""
    folder = run_folder(text, "two")
    checkpoints = folder / "checkpoints"
    process = start(arguments(text, "two"))
    try:
        while not (checkpoints / "step_0000004").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and "stopped by SIGTERM" in output, output
    saved = sorted(path.name for path in checkpoints.iterdir())
    assert saved and all(name.startswith("step_") for name in saved)
    again = start(["--runs-dir", str(folder.parent), "--name", "two", "--resume"])
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "resumed at step" in output, output
    assert "2 x CPU" in output and output.count("picture:") == 1
    yield folder


def losses(folder: Path) -> torch.Tensor:
    records = metrics.of_kind(metrics.read(folder), metrics.TRAIN)
    return torch.tensor([r["loss"] for r in records], dtype=torch.float64)


@pytest.mark.dist
def test_two_processes_train_like_one(two: Path, text: Path) -> None:
    assert main(arguments(text, "one")) == 0
    assert main(arguments(text, "other", seed=1)) == 0
    one, other = run_folder(text, "one"), run_folder(text, "other")
    found = compare(one, two, "fp8")
    assert found["steps"] == TINY["steps"]
    assert found["early"] < 5e-3 and found["late"] < 0.02, found
    # Negative control: other batches and weights are further away than that.
    assert compare(one, other, "fp8")["early"] > 2e-2
    kinds = {r["kind"] for r in metrics.read(two)}
    assert kinds == {r["kind"] for r in metrics.read(run_folder(text, "one"))}
    for record in metrics.of_kind(metrics.read(two), metrics.LOAD):
        assert torch.tensor(record["share"]).sum(dim=1).tolist() == pytest.approx([1, 1])


@pytest.mark.dist
def test_one_process_resumes_what_two_began(two: Path, text: Path) -> None:
    folder = run_folder(text, "again")
    shutil.copytree(two, folder)
    for step in (32, 36):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:07d}")
    words = ["--runs-dir", str(folder.parent), "--name", "again", "--resume", "--ep", "1"]
    assert main(words) == 0
    assert len(losses(folder)) == TINY["steps"]
    assert torch.equal(losses(folder)[:28], losses(two)[:28])
    assert float(((losses(folder) - losses(two)) / losses(two)).abs().max()) < 0.02


def write_run(folder: Path, losses: list[float], model: str = "fp8") -> Path:
    folder.mkdir()
    lines = [{"kind": "train", "step": i, "model": model, "loss": x} for i, x in enumerate(losses)]
    lines += [{"kind": "speed", "model": model, "tokens_per_s": x} for x in (100.0, 300.0)]
    lines += [{"kind": "valid", "model": model, "loss": x} for x in (5.0, losses[-1])]
    (folder / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_comparison_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wavy = [4.0 - 0.1 * i + (-1) ** i * 0.02 for i in range(20)]
    one = write_run(tmp_path / "one", wavy)
    two = write_run(tmp_path / "two", [*wavy[:3], wavy[3] * 1.01, *wavy[4:15], *([2.0] * 5)])
    assert compare_main([str(one), str(two)]) == 0
    found = json.loads(capsys.readouterr().out)
    mean = sum(wavy[-5:]) / 5
    assert found["early"] == pytest.approx(0.01) and found["loss"] == pytest.approx([mean, 2.0])
    assert found["late"] == pytest.approx(1 - 2.0 / mean)
    # Jumps of -0.1 +- 0.04 in turn: a deviation of 0.04 sqrt(4 / 3) over sqrt(2) and sqrt(5).
    assert found["noise"] == pytest.approx(0.04 * (4 / 3 / 2 / 5) ** 0.5 / mean)
    assert found["tokens_per_s"] == [200.0, 200.0]
    assert found["validation_loss"] == [wavy[-1], 2.0]
    assert compare(one, one, "fp8")["early"] == 0
    with pytest.raises(UserError, match="with the same steps, 12 or more, got 20 in .* and 9 in"):
        compare(one, write_run(tmp_path / "short", wavy[:9]), "fp8")
    with pytest.raises(SystemExit):
        compare_main([str(one), str(write_run(tmp_path / "bf16", wavy, "bf16"))])
    assert "a model in common" in capsys.readouterr().err


def test_wrong_numbers_of_processes_are_refused(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, message in (
        ({"ep": 2}, "--ep: expected as many as processes (1), got 2; start with torchrun"),
        ({"ep": 3}, "--experts: expected a multiple of --ep (3), got 4"),
        ({"ep": 4, "batch_size": 6}, "--batch-size: expected a multiple of --ep (4), got 6"),
        ({"ep": 0}, "--ep: expected more than 0, got 0"),
    ):
        assert main(arguments(text, "refused", **changes)) == 2
        assert message in capsys.readouterr().err
        assert not run_folder(text, "refused").exists()
