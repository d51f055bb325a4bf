"""The recipe with two processes that share batches and experts, against one process."""

from __future__ import annotations

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


def apart(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Largest relative difference in the first six steps; that of the last quarter's mean."""
    early = float(((a - b) / b).abs()[:6].max())
    quarter = len(b) // 4
    return early, abs(float(a[-quarter:].mean() / b[-quarter:].mean()) - 1)


@pytest.mark.dist
def test_two_processes_train_like_one(two: Path, text: Path) -> None:
    assert main(arguments(text, "one")) == 0
    assert main(arguments(text, "other", seed=1)) == 0
    one, other = losses(run_folder(text, "one")), losses(run_folder(text, "other"))
    assert len(losses(two)) == len(one) == TINY["steps"]
    early, late = apart(losses(two), one)
    assert early < 5e-3 and late < 0.02, (early, late)
    # Negative control: other batches and weights are further away than that.
    assert apart(other, one)[0] > 2e-2
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
