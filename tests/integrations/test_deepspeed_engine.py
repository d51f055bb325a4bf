"""DeepSpeed engines of two processes: ZeRO, expert parallelism, checkpoints, AutoEP."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs DeepSpeed")

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STAGES = (0, 1, 2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(device: str, **more: str) -> dict[str, str]:
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "FP8MOE_BACKEND": "reference"}
    return os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # which deterministic runs ask for
        "DS_ACCELERATOR": device,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NCCL_NVLS_ENABLE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        **(on_cpu if device == "cpu" else {}),
        **more,
    }


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What the two processes found, in the order of their ranks: over gloo, or NCCL on two GPUs."""
    device = request.param
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("deepspeed")
    env = environment(device, WORLD_SIZE="2")
    worker = Path(__file__).with_name("deepspeed_worker.py")
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), device],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    end = time.monotonic() + 240
    try:
        # One that fails ends the wait: over NCCL the other would notice only at its timeout.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.1)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    texts = [
        f"rank {r}: {c}\n{log.read_text()[-4000:]}"
        for r, (c, log) in enumerate(zip(codes, logs, strict=True))
    ]
    assert codes == [0, 0], "\n".join(texts)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_reduced_gradients_are_those_of_deepspeeds_experts(
    ranks: list[dict[str, Any]], stage: int, ep_size: int
) -> None:
    for results in ranks:
        got = results[f"gradients-{stage}-{ep_size}"]
        assert got["bf16_db"] > 35 and got["bf16_loss"] < 1e-3
        assert got["fp8_db"] > 20 and got["fp8_loss"] < 5e-3
        assert got["swapped_db"] < 10
        assert got.get("misflagged_db", 0) < 10


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_casts_the_weights_again(ranks: list[dict[str, Any]], stage: int) -> None:
    for results in ranks:
        got = results[f"staleness-{stage}"]
        assert got["cached"] == got["uncached"]
        assert got["blind"][:2] == got["cached"][:2]
        assert got["blind"][2:] != got["cached"][2:]  # the check sees a stale copy
        assert got["casts"] == [6, 6]  # three steps, two weights; the second micro-batch hits


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints(ranks: list[dict[str, Any]], stage: int) -> None:
    for results in ranks:
        got = results[f"checkpoints-{stage}"]
        names = ("down_proj", "gate_proj", "up_proj")
        assert got["keys"] == [
            f"moe.deepspeed_moe.experts.deepspeed_experts.{e}.{name}.weight"
            for e in range(2)
            for name in names
        ]
        assert got["restored"]
        assert got["resumed"][0] == got["resumed"][1]
        assert got["from_plain"] and got["to_plain"]


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_that_do_not_fit_are_refused_untouched(
    ranks: list[dict[str, Any]], stage: int
) -> None:
    for results in ranks:
        got = results[f"checkpoints-{stage}"]
        ours, theirs = ("w13 (2, 256, 128)", "1.gate_proj.weight") if stage else ("(2, 256", "(4,")
        for text in (got["refused"], got["refused_plain"]):
            assert ours in text and theirs in text and "load_optimizer_states=False" in text
        assert got["untouched"]
        assert "expected a checkpoint of 2 data-parallel processes, got one of 4" in got["world"]
        assert "a file 'latest'" in got["absent"] and "nowhere" in got["absent"]
        assert "step9" in got["no_tag"]
        assert "before deepspeed.initialize" in got["late"]


@pytest.mark.parametrize("stage", [*STAGES, 3])
def test_autoep_gradients_are_those_of_its_own_experts(
    ranks: list[dict[str, Any]], stage: int
) -> None:
    for results in ranks:
        got = results[f"autoep-{stage}"]
        assert got["bf16_db"] > 35
        assert got["fp8_db"] > 20
        assert got["swapped_db"] < 10
        assert stage != 3 or "cache_weights=False" in got["refused"]


@pytest.mark.parametrize("stage", [*STAGES, 3])
def test_autoep_checkpoints_are_deepspeeds(ranks: list[dict[str, Any]], stage: int) -> None:
    for results in ranks:
        going_on, resumed, plain = results[f"autoep-checkpoint-{stage}"]
        assert resumed == going_on
        assert plain == pytest.approx(going_on, rel=3e-3)
        assert plain != going_on and going_on[0] != going_on[1]


def test_the_documentation_runs_as_written(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert code.count("replace_deepspeed_experts(") == 2 and "/tmp/fp8moe-deepspeed" in code
    script = tmp_path / "documented.py"
    # The compiler that DeepSpeed's optional all-reduce for CPUs needs takes half a minute.
    quick = "import deepspeed\ndeepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
    script.write_text(quick + code.replace("/tmp/fp8moe-deepspeed", str(tmp_path / "saved")))
    env = environment("cpu")
    del env["MASTER_ADDR"]  # which the page sets; the port only lets other tests run beside it
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kind='MoE', num_local_experts=8" in done.stdout
    assert "kind='AutoEP', num_local_experts=8" in done.stdout
