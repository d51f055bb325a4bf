"""The benchmark of expert parallelism: its code path at tiny sizes, and its arithmetic."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.expert_parallel import COLUMNS, TINY, ep_sizes, main

ROOT = Path(__file__).resolve().parents[2]


def torchrun(device: torch.device, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node=2", "-m", "benchmarks.expert_parallel", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.dist
def test_two_processes(tmp_path: Path, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    file = tmp_path / "out" / "rows.jsonl"
    done = torchrun(
        device,
        "--tiny",
        "--iterations=1",
        "--shapes=qwen3",
        f"--json={file}",
        f"--trace={tmp_path}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["ep"], r["combine"]) for r in rows] == [(1, ""), (2, "rows"), (2, "sums")]
    alone, by_row, by_token = rows
    for row in (by_row, by_token):
        on_gpu = device.type == "cuda"
        assert row.keys() >= set(COLUMNS) - ({"GiB"} if not on_gpu else set())
        assert row["world"] == 2 and (row["gpu"] != "none") == on_gpu and row["wire GB/s"] > 0
        assert row["away GB/s"] > 0 and 0 < row["fp8 host ms"] <= row["fp8 ms"] * 1.001
        assert row["efficiency"] == pytest.approx(alone["ms"] / row["ms"])
        # Two rows each, one of them with K weights and ids, in units of 16 bytes: of H bytes and
        # H / 128 scales, and of 2 H bytes.
        h, k = TINY["qwen3"].hidden, TINY["qwen3"].topk
        fp8, bf16 = (
            sum(-(-(row + more) // 16) * 16 for more in (8 * k, 0))
            for row in (h + h // 128 * 4, 2 * h)
        )
        assert row["fp8 MB"] / row["bf16 MB"] == pytest.approx(fp8 / bf16)
    assert by_token["combine MB"] < by_row["combine MB"]
    for name in ("qwen3-1-", "qwen3-2-rows-0", "qwen3-2-sums-0"):
        trace = json.loads(gzip.decompress((tmp_path / f"{name}.json.gz").read_bytes()))
        sent = [e for e in trace["traceEvents"] if "alltoall" in e["name"].replace("_", "")]
        assert bool(sent) == ("-2-" in name)
    table = done.stdout.splitlines()
    assert table[0].split()[:3] == ["shape", "ep", "combine"] and len(table) >= 4


def test_sizes_of_groups() -> None:
    assert ep_sizes(8, None) == [1, 2, 4, 8]
    assert ep_sizes(6, None) == [1, 2]
    assert ep_sizes(8, [4, 2, 4]) == [2, 4]
    for wrong in (0, 3):
        with pytest.raises(SystemExit, match=f"--ep: expected divisors of the 8.* got {wrong}"):
            ep_sizes(8, [wrong])


def test_outside_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["expert_parallel"])
    with pytest.raises(SystemExit, match="expected to be started by torchrun"):
        main()
