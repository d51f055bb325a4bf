"""Experts spread over 2 and 4 processes against the same experts in one.

The processes of one group size start once and go through all checks (dispatch_layer_checks.py,
dispatch_model_checks.py). On the CPU over gloo, and over NCCL where there are as many GPUs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dispatch_layer_checks  # noqa: F401  (its checks enter themselves into CHECKS)
import pytest
import torch
from dispatch_model_checks import assert_resumes
from dispatch_ranks import CHECKS, launch, where


def sizes_for(device: str) -> list[int]:
    if device == "cpu":
        return [2, 4]
    return [n for n in (2, 4, 8) if n <= torch.cuda.device_count()]


# One test for all checks: they share processes, and test workers would each start their own.
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_checks(device: torch.device, tmp_path: Path) -> None:
    sizes = sizes_for(device.type)
    if not sizes:
        pytest.skip("needs at least two GPUs")
    for size in sizes:
        outcomes = launch(size, tmp_path, device.type)
        failures = [
            f"{name}, rank {rank} of {size}:\n{text}"
            for rank, outcome in enumerate(outcomes)
            for name, text in outcome.items()
            if text != "passed"
        ]
        assert not failures, "\n".join(failures)
        assert all(outcome.keys() == CHECKS.keys() for outcome in outcomes)
        # One process resumes what many saved.
        assert_resumes(tmp_path / f"saved-{size}", device, None, no_dist=True)


def test_a_check_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    program = """
import sys, time, pathlib
from dispatch_ranks import Progress
progress = Progress(0, 2, pathlib.Path(sys.argv[1]))
with progress.of("quick", 60):
    pass
with progress.of("waits_for_ever", 0.5):
    time.sleep(60)
"""
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1
    assert "[0] quick: 0.0" in done.stdout and "waits_for_ever: begins" in done.stdout
    report = where(2, tmp_path)
    assert report.startswith("rank 0 of 2: waits_for_ever: begins, limit 0.5 s\nTimeout (0:00:00.5")
    assert 'File "<string>", line 8 in <module>' in report  # where it slept
    assert report.endswith("rank 1 of 2: did not begin")
