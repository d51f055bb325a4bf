"""Rendering, compilation and the disk cache; nothing here needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fp8moe.kernels import disk_cache, driver, jit, launch

SCALE_SOURCE = """
extern "C" __global__ void scale(float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= FACTOR;
}
"""

# Sixty-four values that live across a barrier cannot stay in 32 registers.
SPILL_SOURCE = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill(const float* x, float* y) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) y[threadIdx.x + 1024 * i] = v[i] * v[63 - i];
}
"""

# Without launch bounds the assembler does not know the register count and ignores setmaxnreg.
SETMAXNREG_SOURCE = """
extern "C" __global__ void ignored(float* x) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  x[threadIdx.x] = 1.f;
}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("FP8MOE_CACHE_DIR", str(directory))
    monkeypatch.delenv("FP8MOE_CACHE_MB", raising=False)
    return directory


def make_spec(
    folder: Path, source: str = SCALE_SOURCE, entry: str = "scale", factor: str = "2.0f"
) -> jit.KernelSpec:
    path = folder / f"{entry}.cuh"
    path.write_text(source)
    return jit.KernelSpec(str(path), entry, (("FACTOR", factor),))


# ------------------------------------------------------------------------------------------- render


def test_render_puts_constants_first_and_inlines_each_header_once(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text("#pragma once\nint in_a;\n")
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "a.cuh"\nint in_b;\n')
    top = tmp_path / "top.cuh"
    top.write_text('#include "a.cuh"\n#include "b.cuh"\nint in_top;\n')
    text = jit.render(jit.KernelSpec(str(top), "k", (("ONE", 1), ("TYPE", "float"))))
    assert text.startswith("#define ONE 1\n#define TYPE float\n")
    assert text.count("int in_a;") == text.count("int in_b;") == text.count("int in_top;") == 1
    assert text.index("in_a") < text.index("in_b") < text.index("in_top")
    assert "#pragma once" not in text and "#include" not in text


def test_render_names_a_missing_header(tmp_path: Path) -> None:
    (tmp_path / "top.cuh").write_text('int x;\n#include "absent.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"top\.cuh:2: no header .*absent\.cuh"):
        jit.render(jit.KernelSpec(str(tmp_path / "top.cuh"), "k"))


def test_error_lines_are_those_of_the_source_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "h.cuh").write_text("#pragma once\nint a;\nint b;\nint c;\n")
    source = '#include "h.cuh"\n#include "h.cuh"\nint fine;\nint bad = nowhere;\n'
    with pytest.raises(jit.CompileError, match=r"bad\.cuh\(4\): error"):
        jit.compile(make_spec(tmp_path, source, "bad"))


# -------------------------------------------------------------------------------------- compilation


def test_compile_gives_a_cubin_and_its_registers(cache: Path, tmp_path: Path) -> None:
    compiled = jit.compile(make_spec(tmp_path))
    assert compiled.cubin[:4] == b"\x7fELF"
    used = jit.usage(compiled.log)["scale"]
    assert 0 < used.registers <= 32
    assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0


def test_compile_error_has_the_log_and_the_rendered_source(cache: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, SCALE_SOURCE.replace("float* x", "floot* x"))
    with pytest.raises(jit.CompileError) as caught:
        jit.compile(spec)
    error = caught.value
    assert "floot" in error.log and "floot" in str(error)
    assert error.path is not None and error.path.read_text() == jit.render(spec)
    assert str(error.path) in str(error)


@pytest.mark.parametrize(
    ("source", "entry", "reason"),
    [
        pytest.param(SPILL_SOURCE, "spill", "spill", id="spills"),
        pytest.param(SETMAXNREG_SOURCE, "ignored", "C7508", id="setmaxnreg ignored"),
        pytest.param(SCALE_SOURCE, "other", "no extern .* other", id="no such entry"),
    ],
)
def test_compile_rejects(cache: Path, tmp_path: Path, source: str, entry: str, reason: str) -> None:
    with pytest.raises(jit.CompileError, match=reason):
        jit.compile(make_spec(tmp_path, source, entry))
    assert disk_cache.usage()[0] == 0


def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.pathfinder

    def absent(name: str) -> None:
        raise RuntimeError(f"no {name} here")

    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", absent)
    with pytest.raises(RuntimeError, match="nvidia-cuda-nvrtc>=13.0.88, got no nvrtc here"):
        jit.compiler.__wrapped__()


def test_load_without_a_driver_names_the_driver(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise driver.DriverError("CUDA driver: expected an NVIDIA driver on this machine")

    monkeypatch.setattr(launch, "driver", absent)
    with pytest.raises(driver.DriverError, match="expected an NVIDIA driver"):
        jit.load(make_spec(tmp_path))


# -------------------------------------------------------------------------------------------- cache


@pytest.fixture
def nvrtc_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = jit._nvrtc

    def counting(source: str, name: str, options: tuple[str, ...]) -> tuple[bytes | None, str]:
        calls.append(name)
        return real(source, name, options)

    monkeypatch.setattr(jit, "_nvrtc", counting)
    return calls


def test_second_compile_comes_from_the_cache(
    cache: Path, tmp_path: Path, nvrtc_calls: list[str]
) -> None:
    spec = make_spec(tmp_path)
    first = jit.compile(spec)
    assert jit.compile(spec) == first
    assert len(nvrtc_calls) == 1


def test_key_covers_source_constants_options_and_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {jit.cache_path(make_spec(tmp_path))}
    paths.add(jit.cache_path(make_spec(tmp_path, factor="3.0f")))
    paths.add(jit.cache_path(make_spec(tmp_path, SCALE_SOURCE + "// changed\n")))
    make_spec(tmp_path)
    monkeypatch.setattr(jit, "OPTIONS", (*jit.OPTIONS, "-lineinfo"))
    paths.add(jit.cache_path(make_spec(tmp_path)))
    monkeypatch.setattr(jit, "_compiler_fingerprint", lambda: "13.9/1")
    paths.add(jit.cache_path(make_spec(tmp_path)))
    assert len(paths) == 5


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
def test_damaged_cache_file_is_recompiled(
    cache: Path, tmp_path: Path, nvrtc_calls: list[str], damage: str
) -> None:
    spec = make_spec(tmp_path)
    good = jit.compile(spec)
    path = jit.cache_path(spec)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-10] ^= 1
    path.write_bytes(
        {"truncate": data[:-100], "flip": data, "empty": b"", "foreign": b"\x7fELF" * 99}[damage]
    )
    assert jit.compile(spec).cubin == good.cubin
    assert len(nvrtc_calls) == 2
    jit.compile(spec)
    assert len(nvrtc_calls) == 2  # and the good file is back


def test_eviction_is_bounded_and_drops_the_least_recently_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(1000)
    for i in range(5):
        disk_cache.write(f"k{i}", content)
        os.utime(disk_cache.path(f"k{i}"), (1000.0 + i, 1000.0 + i))
    assert disk_cache.read("k0") == content  # used now: k1 is the oldest
    monkeypatch.setenv("FP8MOE_CACHE_MB", str(4 * 1100 / 2**20))
    disk_cache.write("k5", content)
    assert {path.stem for path in cache.iterdir()} == {"k0", "k3", "k4", "k5"}
    monkeypatch.setenv("FP8MOE_CACHE_MB", str(1 / 2**20))
    disk_cache.write("k6", content)
    assert {path.stem for path in cache.iterdir()} == {"k6"}  # what was just written stays


def test_eviction_cleans_up_after_killed_writers_only(cache: Path) -> None:
    cache.mkdir()
    (cache / "old.tmp").write_bytes(b"x")
    os.utime(cache / "old.tmp", (1.0, 1.0))
    (cache / "new.tmp").write_bytes(b"x")
    (cache / "not-ours.txt").write_bytes(b"x")
    disk_cache.write("k", b"content")
    assert {path.name for path in cache.iterdir()} == {"new.tmp", "not-ours.txt", "k.kernel"}


def test_an_empty_limit_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8MOE_CACHE_MB", "")
    assert disk_cache.limit_bytes() == 512 << 20


@pytest.mark.parametrize("value", ["0", "-1", "much", "nan", "inf"])
def test_bad_limit_names_the_value(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FP8MOE_CACHE_MB", value)
    with pytest.raises(ValueError, match=f"FP8MOE_CACHE_MB: expected .* got '{value}'"):
        disk_cache.limit_bytes()


def test_interrupted_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        disk_cache.write_atomically(cache / "k.kernel", b"content")
    assert list(cache.iterdir()) == []


def test_readers_never_see_half_a_file(cache: Path) -> None:
    contents = [bytes([i]) * 200_000 for i in range(3)]
    disk_cache.write("k", contents[0])
    stop = time.monotonic() + 0.5
    seen: list[bytes | None] = []

    def write(content: bytes) -> None:
        while time.monotonic() < stop:
            disk_cache.write("k", content)

    def read() -> None:
        while time.monotonic() < stop:
            seen.append(disk_cache.read("k"))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) > 10 and all(content in contents for content in seen)


def test_unwritable_cache_still_compiles_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("FP8MOE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be written .* FP8MOE_CACHE_DIR"):
        assert jit.compile(make_spec(tmp_path)).cubin
    with pytest.raises(jit.CompileError) as caught:
        jit.compile(make_spec(tmp_path, "int x = y;", "bad"))
    assert caught.value.path is not None and caught.value.path.is_file()
    caught.value.path.unlink()


CHILD = """
import sys
from fp8moe.kernels import jit
spec = jit.KernelSpec(sys.argv[1], "scale", (("FACTOR", "2.0f"),))
sys.stdin.readline()
sys.stdout.buffer.write(jit.compile(spec).cubin)
"""


@pytest.mark.dist
def test_many_processes_start_cold_at_once(cache: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, spec.source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"go\n")
        child.stdin.flush()
    cubins = {child.communicate(timeout=120)[0] for child in children}
    assert all(child.returncode == 0 for child in children)
    assert cubins == {jit.compile(spec).cubin}
    assert [path.suffix for path in cache.iterdir()] == [".kernel"]


# ------------------------------------------------------------------------------------------ warm-up


def test_warmup_compiles_all_once_and_keeps_going_after_an_error(
    cache: Path, tmp_path: Path, nvrtc_calls: list[str]
) -> None:
    good = [make_spec(tmp_path, factor=f"{i}.0f") for i in range(3)]
    bad = make_spec(tmp_path, "int x = y;", "bad")
    done: list[jit.Warmed] = []
    results = jit.warmup([good[0], bad, good[1], good[0], good[2]], jobs=2, on_done=done.append)
    assert [result.spec for result in results] == [good[0], bad, good[1], good[2]]
    assert [result.error is None for result in results] == [True, False, True, True]
    assert [result.compiled is None for result in results] == [False, True, False, False]
    assert len(nvrtc_calls) == 4 and len(done) == 4
    assert disk_cache.usage()[0] == 3


def test_warmup_rejects_zero_jobs() -> None:
    with pytest.raises(ValueError, match="jobs: expected at least 1, got 0"):
        jit.warmup([], jobs=0)
