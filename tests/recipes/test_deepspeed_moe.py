"""The DeepSpeed recipe: its README's run, stopping and resuming, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.deepspeed_moe.options import read
from recipes.deepspeed_moe.train import main
from recipes.pretrain.config import UserError

ROOT = Path(__file__).parents[2]
README = ROOT / "recipes" / "deepspeed_moe" / "README.md"
TINY = "--preset cpu --layers 1 --seq-len 64 --eval-batches 2 --checkpoint-every 3 --log-every 1"

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"
)


def start(arguments: list[str]) -> str:
    """What a command of this Python prints; it must succeed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def blocks(text: str) -> list[str]:
    return re.findall(r"```\n(.*?)```", text, re.DOTALL)


def numbers(line: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", line)]


@pytest.mark.dist
@pytest.mark.slow
@needs_deepspeed
def test_the_readme_shows_what_its_smallest_run_prints(tmp_path: Path) -> None:
    command, expected = blocks(README.read_text(encoding="utf-8"))[1:3]
    launcher, *arguments = shlex.split(command)
    assert launcher == "torchrun"
    out = tmp_path / "run"
    arguments[arguments.index("--out") + 1] = str(out)
    # Any free port; and the first process alone, as DeepSpeed's messages of the other one may
    # come in the middle of a line.
    run = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-ranks-filter", "0"]
    printed = start(["-m", "torch.distributed.run", *run, *arguments]).splitlines()

    # Only roughly: the text is another with another torch, and the first steps at this learning
    # rate enlarge differences in rounding between processors (the balance by a tenth at step 20).
    tolerance = 0.15
    *lines, last, saved = expected.splitlines()
    for line in lines:
        key = re.split(r"  loss|: ", line)[0]
        (got,) = (other for other in printed if other.startswith(key))
        if key.startswith("blocks"):
            assert got == line
        else:
            assert numbers(got) == pytest.approx(numbers(line), rel=tolerance), (got, line)
    speed = r"[\d,]+ tokens/s, peak memory \d+\.\d\d GiB a process"
    assert re.fullmatch(speed, last) and sum(bool(re.fullmatch(speed, o)) for o in printed) == 1

    checkpoints = r"2 checkpoints, \d+\.\d s each, not in the tokens/s"
    assert re.fullmatch(checkpoints, saved) and re.fullmatch(checkpoints, printed[-1])

    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["checkpoint_seconds"]) == 2 and min(summary["checkpoint_seconds"]) > 0
    assert summary["validation_loss_after"] < summary["validation_loss_before"] - 2
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 0
    assert (out / "checkpoints" / "latest").read_text() == "step_20"
    experts = sorted(p.name for p in (out / "checkpoints" / "step_20").glob("layer_0_expert_*"))
    assert len(experts) == 4


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines
    ]


@pytest.mark.dist
@pytest.mark.slow
@needs_deepspeed
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(text, tmp_path / "text")

    def run(name: str, *more: str) -> list[str]:
        where = ["--data", str(data), "--out", str(tmp_path / name)]
        return ["-m", "recipes.deepspeed_moe", *TINY.split(), *where, *more]

    start(run("straight", "--steps", "6", "--checkpoint-every", "0"))
    assert not (tmp_path / "straight" / "checkpoints").exists()
    summary = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert summary["checkpoint_seconds"] == []
    start(run("stopped", "--steps", "3"))
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["tokens_per_second"] is None  # JSON has no NaN
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')  # what a run that was killed wrote after its checkpoint
    assert "resumed at step 3" in start(run("stopped", "--steps", "6", "--resume"))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    losses = [line["loss"] for line in metrics(tmp_path / "straight")]
    assert len(set(losses)) == 6  # so that equal runs are not equal by standing still

    def refused(*more: str) -> str:
        before = sorted((tmp_path / "stopped").rglob("*"))
        assert main(run("stopped", *more)[2:]) == 2
        assert sorted((tmp_path / "stopped").rglob("*")) == before
        return capsys.readouterr().err

    assert "is not empty" in refused()
    assert "--d-expert: expected 128" in refused("--resume", "--d-expert", "256")
    assert "--experts: expected fp8" in refused("--resume", "--experts", "deepspeed")
    with next(data.iterdir()).open("a") as file:
        file.write("another text")
    assert "the text has changed since the run began" in refused("--resume", "--steps", "6")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "world_size: expected 1" in refused("--resume")
    assert read(run("new", "--experts", "bf16")[2:]).options.experts == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ep-size 3", "--ep-size: expected a divisor of the 4 --num-experts, got 3"),
        ("--ep-size 4", "--ep-size: expected a divisor of the 2 processes, got 4"),
        ("--experts fp4", "--experts: expected fp8 or bf16 or deepspeed, got fp4"),
        ("--capacity-factor -1", "--capacity-factor: expected 0 or more"),
        ("--checkpoint-every -1", r"--checkpoint-every: expected 0 \(none\) or more, got -1"),
        ("--resume", "--resume: no run in"),
        ("--zero-stage 0", "grad_accum_dtype: expected bf16 with ZeRO stage 0"),
        ("--deepspeed-config {stage3}", "stage: expected 0, 1 or 2.*got 3"),
        ("--deepspeed-config {empty}", "train_micro_batch_size_per_gpu: expected a number"),
        ("--deepspeed-config {broken}", "cannot read .*broken"),
        ("--deepspeed-config {fp32}", 'expected "bf16"'),
    ],
)
def test_bad_requests_are_refused(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    batch, bf16 = {"train_micro_batch_size_per_gpu": 1}, {"bf16": {"enabled": True}}
    files = {
        "stage3": json.dumps(batch | bf16 | {"zero_optimization": {"stage": 3}}),
        "empty": "{}",
        "broken": "{",
        "fp32": json.dumps(batch),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    paths = {name: tmp_path / name for name in files}
    words = arguments.format(**paths).split()
    with pytest.raises(UserError, match=message):
        read(["--preset", "cpu", "--out", str(tmp_path / "run"), *words])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--d-expert 24", "--d-expert: expected a multiple of 16"),
        ("--top-k 5", "--top-k: expected"),
        ("--eval-batches 1", "--eval-batches: expected held-out text for 2 processes, got 1"),
    ],
)
def test_bad_models_are_refused(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "run"
    assert main(["--preset", "cpu", "--out", str(out), *arguments.split()]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_help_says_what_options_do_and_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: python -m recipes.deepspeed_moe ")
    assert "--layers LAYERS transformer layers, each with a mixture of experts; default: 2" in text
    assert "default: 2 (cpu), 6 (h100)" in text and "None" not in text


def test_missing_deepspeed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert main(["--preset", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'fp8moe[deepspeed]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
