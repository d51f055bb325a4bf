"""docs/expert_parallel.md: its code runs as written, its tables are what their command prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cluster

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "expert_parallel.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(device: str, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["NCCL_NVLS_ENABLE"] = "0"
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.dist
def test_example_under_torchrun(tmp_path: Path, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    script = tmp_path / "train_ep.py"
    script.write_text(EXAMPLE, encoding="utf-8")
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    assert "torchrun --nproc-per-node 2 train_ep.py" in TEXT
    found = re.search(r"gradient norm (\d+\.\d+)", run(device.type, *torchrun, str(script)))
    assert found and float(found[1]) > 0


def test_tables_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (arguments,) = re.findall(r"^    python -m benchmarks.cluster (.*)$", TEXT, re.MULTILINE)
    cluster.main(shlex.split(arguments))
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert f"\n\n{first}\n\n" in TEXT and f"\n\n{second}\n\n" in TEXT
