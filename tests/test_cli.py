"""The ``fp8moe`` command: doctor, warmup, bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe import bench, cli, doctor, shapes, warmup
from fp8moe.kernels import disk_cache, driver, jit, registry


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: Any) -> None:
    monkeypatch.setenv("FP8MOE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("FP8MOE_BACKEND", "FP8MOE_CACHE_MB", "FP8MOE_DEBUG"):
        environment(name, None)


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise driver.DriverError("CUDA driver: expected an NVIDIA driver, found no libcuda")

    monkeypatch.setattr(driver, "driver", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, name: str, major: int, minor: int) -> None:
    gpu = {
        "index": 0,
        "name": name,
        "capability": f"{major}.{minor}",
        "memory_gib": 79.6,
        "multiprocessors": 132,
    }
    monkeypatch.setattr(doctor, "_driver", lambda: {"ok": True, "version": "13.0", "reason": None})
    monkeypatch.setattr(doctor, "_gpus", lambda driver: ([gpu], None))
    monkeypatch.setattr(registry, "_gpu", lambda index: (name, (major, minor)))


def run_doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert cli.main(["doctor"]) == code
    return code, report, capsys.readouterr().out


# ------------------------------------------------------------------------------------------ doctor


def test_doctor_without_a_driver(no_driver: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, text = run_doctor(capsys)
    assert code == 0 and report["usable"]
    assert report["backends"] == [{"device": "cpu", "backend": "reference", "reason": None}]
    assert not report["driver"]["ok"] and "no libcuda" in report["driver"]["reason"]
    assert report["nvrtc"]["ok"] and report["nvrtc"]["compile_ms"] > 0
    assert report["cache"]["kernels"] == 0 and report["cache"]["writable"]
    assert "reference (slow) runs on cpu" in report["verdict"]
    lines = text.strip().splitlines()
    assert len(lines) <= 24 and all(len(line) < 200 for line in lines)
    for name in ("fp8moe", "python", "torch", "driver", "nvrtc", "cache", "backend", "verdict"):
        assert any(line.startswith(name) for line in lines), name


def test_doctor_on_hopper(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpus(monkeypatch, "NVIDIA H100 80GB HBM3", 9, 0)
    code, report, text = run_doctor(capsys)
    assert code == 0 and report["verdict"] == "FP8 kernels run on cuda:0."
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 multiprocessors" in text


def test_doctor_on_another_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpus(monkeypatch, "NVIDIA A100", 8, 0)
    code, report, text = run_doctor(capsys)
    assert code == 0  # the CPU reference still works
    assert report["backends"][1]["backend"] is None
    assert "NVIDIA A100" in report["verdict"] and "FP8MOE_BACKEND=reference" in text


def test_doctor_on_hopper_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpus(monkeypatch, "NVIDIA H100", 9, 0)

    def absent() -> tuple[str, str]:
        raise RuntimeError("NVRTC: expected the package nvidia-cuda-nvrtc>=13.0.88, got nothing")

    monkeypatch.setattr(jit, "compiler", absent)
    _, report, _ = run_doctor(capsys)
    assert report["backends"][1]["backend"] is None
    assert "nvidia-cuda-nvrtc>=13.0.88" in report["verdict"]


def test_doctor_fails_when_nothing_is_usable(
    no_driver: None, environment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    environment("FP8MOE_BACKEND", "cuda")
    code, report, text = run_doctor(capsys)
    assert code == 1 and not report["usable"]
    assert "Nothing is usable: FP8MOE_BACKEND=cuda" in text


def test_doctor_names_a_bad_setting(
    no_driver: None,
    monkeypatch: pytest.MonkeyPatch,
    environment: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment("FP8MOE_BACKEND", "triton")
    monkeypatch.setenv("FP8MOE_CACHE_MB", "lots")
    code, _, text = run_doctor(capsys)
    assert code == 1 and "got 'triton'" in text and "got 'lots'" in text


def test_doctor_sees_an_unwritable_cache(
    no_driver: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8MOE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    code, report, text = run_doctor(capsys)
    assert code == 0 and not report["cache"]["writable"] and "NOT WRITABLE" in text


def test_doctor_leaves_nothing_in_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    run_doctor(capsys)
    assert list(disk_cache.directory().iterdir()) == []


def test_doctor_as_a_command_ends_quickly() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fp8moe.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usable"]


# ------------------------------------------------------------------------------------------ warmup


def tiny_specs(folder: Path, count: int = 3) -> list[jit.KernelSpec]:
    path = folder / "tiny.cuh"
    path.write_text('extern "C" __global__ void tiny(int* x) { x[threadIdx.x] = VALUE; }\n')
    return [jit.KernelSpec(str(path), "tiny", (("VALUE", i),)) for i in range(count)]


def test_warmup_fills_the_cache_and_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warmup, "all_specs", lambda: tiny_specs(tmp_path))
    assert cli.main(["warmup", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert disk_cache.usage()[0] == 3
    assert "3 kernels for sm_90a" in out and "[3/3]" in out and "3 of 3 kernels ready" in out


def test_warmup_reports_what_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = tiny_specs(tmp_path)
    bad = jit.KernelSpec(specs[0].source, "tiny", (("VALUE", "nowhere"),))
    monkeypatch.setattr(warmup, "all_specs", lambda: [specs[0], bad, specs[1]])
    assert cli.main(["warmup"]) == 1
    captured = capsys.readouterr()
    assert "2 of 3 kernels ready" in captured.out
    assert '"nowhere" is undefined' in captured.err and "rendered source: " in captured.err


def test_warmup_for_a_preset_compiles_what_its_layer_uses(
    tmp_path: Path, no_driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def layer_specs(*args: Any) -> list[jit.KernelSpec]:
        asked.append(args)
        return tiny_specs(tmp_path, 1)

    monkeypatch.setattr(warmup, "layer_specs", layer_specs)
    assert cli.main(["warmup", "--preset", "deepseek-v3", "--experts", "8"]) == 0
    assert cli.main(["warmup", "--preset", "olmoe-1b-7b", "--tokens", "512", "--sms", "78"]) == 0
    sizes = ["--hidden", "256", "--intermediate", "128", "--experts", "4", "--topk", "2"]
    assert cli.main(["warmup", *sizes]) == 0
    assert asked == [
        (shapes.LayerShape(7168, 2048, 8, 8), warmup.TOKENS, 132),
        (shapes.PRESETS["olmoe-1b-7b"], [512], 78),
        (shapes.LayerShape(256, 128, 4, 2), warmup.TOKENS, 132),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["warmup", "--hidden", "256"], "expected also --intermediate, --experts, --topk"),
        (["warmup", "--tokens", "5"], "--tokens and --sms go with"),
        (["warmup", "--jobs", "0"], "expected at least 1, got 0"),
        (["warmup", "--preset", "gpt"], "invalid choice: 'gpt'"),
        ([], "required: command"),
    ],
)
def test_wrong_usage_is_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_warmup_names_a_size_that_no_kernel_takes(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", "100", "--intermediate", "128", "--experts", "4", "--topk", "2"]
    assert cli.main(["warmup", *sizes]) == 1
    assert "hidden: expected a positive multiple of 16, got 100" in capsys.readouterr().err


def test_warmup_refuses_a_cache_that_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8MOE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cli.main(["warmup", "--preset", "olmoe-1b-7b"]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("preset", sorted(shapes.PRESETS))
def test_layer_specs_are_some_of_all(preset: str) -> None:
    every = warmup.all_specs()
    chosen = warmup.layer_specs(shapes.PRESETS[preset], tokens=[128, 16384])
    assert set(chosen) < set(every)
    sources = {spec.source for spec in chosen}
    assert sources == {spec.source for spec in every}
    gemms = [dict(spec.constants) for spec in chosen if spec.source == "gemm.cuh"]
    assert {c["GROUPING"] for c in gemms} == {1, 3}  # m_grouped and k_grouped, nothing else
    assert {c["OUTPUT"] for c in gemms} == {0, 1, 2, 3, 4}


def test_layer_specs_depend_on_the_gpu_and_the_tokens() -> None:
    shape = shapes.PRESETS["qwen3-30b-a3b"]
    few, many = (set(warmup.layer_specs(shape, tokens=[t])) for t in (128, 65536))
    assert few != many
    assert few | many <= set(warmup.layer_specs(shape, tokens=[128, 65536]))


# ------------------------------------------------------------------------------------------- bench


def test_bench_says_what_it_needs(no_driver: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 1
    error = capsys.readouterr().err
    for part in ("Hopper GPU", "9.0", "no libcuda", "fp8moe doctor"):
        assert part in error


def test_bench_names_a_gpu_that_is_not_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "driver", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(registry, "_gpu", lambda index: ("NVIDIA L4", (8, 9)))
    reason = bench.missing()
    assert reason is not None and "NVIDIA L4 has compute capability 8.9" in reason


@pytest.mark.gpu
@pytest.mark.slow
def test_bench_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FP8MOE_CACHE_DIR")
    assert cli.main(["bench", "--preset", "olmoe-1b-7b", "--tokens", "4096"]) == 0
    out = capsys.readouterr().out
    assert "gemm_nt" in out and "k_grouped_gemm" in out and "FP8 layer:" in out
