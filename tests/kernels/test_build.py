"""Every shipped kernel, compiled for sm_90a without a GPU: registers, spills and SASS."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fp8moe import warmup
from fp8moe.kernels import gemm, jit
from fp8moe.kernels.heuristics import Grouping, Output, Tile

SPECS = warmup.all_specs()

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

# An index known only at run time puts the array into local memory; the assembler calls it no spill.
LOCAL_SOURCE = """
extern "C" __global__ void __launch_bounds__(128) local(const float* x, float* y, int i) {
  float v[64];
  for (int j = 0; j < 64; ++j) v[(j * i) & 63] = x[threadIdx.x + 128 * j];
  for (int j = 0; j < 64; ++j) y[threadIdx.x + 128 * j] = v[(j + i) & 63];
}
"""

PLAIN_SOURCE = """
extern "C" __global__ void __launch_bounds__(128) plain(float* x) { x[threadIdx.x] += 1.f; }
"""


def disassembler() -> str:
    """nvdisasm from the pip package, else from the path."""
    try:
        for file in importlib.metadata.files("nvidia-cuda-nvdisasm") or ():
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return str(file.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    found = shutil.which("nvdisasm")
    if found is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found


@functools.lru_cache(maxsize=4)  # the entries of one file share a cubin
def disassembly(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [disassembler(), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def operations(cubin: bytes, entry: str) -> list[str]:
    """The instructions of one kernel in order: ["UTMALDG.2D", "LDG.E", ...]."""
    section = disassembly(cubin).split(f".section\t.text.{entry},")[1].split("\n\t.section\t")[0]
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", section)
    assert len(found) > 5, f"no instructions found in the disassembly of {entry}"
    return found


def gpu_wide_barriers(used: list[str]) -> list[str]:
    """Memory barriers of the whole GPU, which cost a third of the speed if every stage has one,
    anywhere but where a cluster starts and ends."""
    found = []
    # Each fence of a report to the host (MEMBAR.SC.SYS) invalidates as well.
    ends, reports = used.count("UCGABAR_WAIT"), used.count("MEMBAR.SC.SYS")
    for name, allowed in (("MEMBAR.ALL.GPU", ends), ("CCTL.IVALL", ends + reports)):
        if used.count(name) > allowed:
            found.append(f"has {used.count(name)} {name}, expected at most {allowed}")
    return found


def delayed_wgmma(spec: jit.KernelSpec, used: list[str]) -> list[str]:
    """What a small tile has between the wgmma of a k-block: moves to uniform registers, scales."""
    tile = dict(spec.constants)
    if int(tile.get("BLOCK_M", 256)) * int(tile.get("BLOCK_N", 256)) > 128 * 128:
        return []
    wgmma = [i for i, name in enumerate(used) if name.startswith("QGMMA")]
    if len(wgmma) != 4:  # 32 of a k-block's 128 each, and no half
        return [f"has {len(wgmma)} wgmma, expected 4"]
    between = used[wgmma[0] : wgmma[-1]]
    late = sorted({name for name in between if name.split(".")[0] in ("R2UR", "LDS", "FMUL")})
    return [f"has {', '.join(late)} between two wgmma"] if late else []


def problems(spec: jit.KernelSpec, compiled: jit.Compiled, tensor_cores: bool) -> list[str]:
    """What is wrong with a compiled kernel, one sentence each."""
    found = []
    used = jit.usage(compiled.log)[spec.entry]
    if used.spill_store_bytes or used.spill_load_bytes:
        found.append(f"spills {used.spill_store_bytes + used.spill_load_bytes} bytes")
    if used.stack_bytes:
        found.append(f"has {used.stack_bytes} bytes of stack")
    executed = operations(compiled.cubin, spec.entry)
    names = {name.split(".")[0] for name in executed}
    local = names & {"LDL", "STL"}
    if local:
        found.append(f"uses local memory: {', '.join(sorted(local))}")
    if tensor_cores:
        absent = {"QGMMA", "UTMALDG", "USETMAXREG", "SYNCS"} - names
        if absent:
            found.append(f"lacks {', '.join(sorted(absent))}")
        found += gpu_wide_barriers(executed) + delayed_wgmma(spec, executed)
        # setmaxnreg moves registers between the roles only if each starts with an even share.
        threads = 512 if dict(spec.constants).get("BLOCK_M") == 192 else 384
        share = 65536 // threads // 8 * 8
        if used.registers != share:
            found.append(f"has {used.registers} registers, expected {share} for {threads} threads")
    elif used.registers > 128:
        found.append(f"has {used.registers} registers: under two blocks of 256 threads fit")
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_shipped_kernel(spec: jit.KernelSpec) -> None:
    compiled = jit.compile(spec)
    assert problems(spec, compiled, tensor_cores=spec.source == "gemm.cuh") == []


# ---------------------------------------------------------------------------------- nothing missed


def test_specs_are_distinct() -> None:
    assert len(set(SPECS)) == len(SPECS)
    assert len({str(spec) for spec in SPECS}) == len(SPECS)


def test_every_module_that_makes_specs_is_collected() -> None:
    folder = Path(jit.__file__).parent
    for path in sorted(folder.glob("*.py")):
        if "KernelSpec(" in path.read_text(encoding="utf-8") and path.name != "jit.py":
            module = importlib.import_module(f"fp8moe.kernels.{path.stem}")
            specs = module.kernel_specs()
            assert specs and set(specs) <= set(SPECS), f"{path.name}: not in warmup.all_specs()"


def test_every_source_is_part_of_a_kernel() -> None:
    rendered = "\n".join(jit.render(spec) for spec in dict.fromkeys(SPECS))
    for path in jit.CSRC.glob("*.cuh"):
        assert f'#line 1 "{path.name}"' in rendered, f"{path.name} is in no shipped kernel"


def test_sources_include_only_our_own_headers() -> None:
    for path in jit.CSRC.glob("*.cuh"):
        assert not re.search(r"^\s*#\s*include\s*<", path.read_text(), re.MULTILINE), path.name


# -------------------------------------------------------------------------------- negative controls


def make_spec(folder: Path, source: str, entry: str) -> jit.KernelSpec:
    path = folder / f"{entry}.cuh"
    path.write_text(source)
    return jit.KernelSpec(str(path), entry)


@pytest.mark.parametrize(
    ("tile", "right", "wrong", "message"),
    [
        (Tile(64, 64), "SMALL_TILE = ", "SMALL_TILE = false && ", "R2UR between two wgmma"),
        (Tile(64, 128, 2), "__reduce_max_sync(~0u, x)", "x", "has R2UR between two wgmma"),
        (
            Tile(64, 64),
            "SMALL_TILE) scales",
            "SMALL_TILE != 1) scales",
            "has LDS between two wgmma",
        ),
        (Tile(64, 64, 4), "try_wait.parity", "try_wait.parity.acquire.cluster", "CCTL.IVALL"),
    ],
    ids=["compiler's choice", "no redux", "early scales", "acquire"],
)
def test_what_delays_a_wgmma_is_seen(tile: Tile, right: str, wrong: str, message: str) -> None:
    spec = gemm.spec(Grouping.DENSE, Output.BF16, tile, 1)
    source = jit.render(spec)
    assert right in source
    cubin, log = jit._nvrtc(source.replace(right, wrong), spec.source, jit.OPTIONS)
    assert cubin is not None, log
    found = problems(spec, jit.Compiled(cubin, log), tensor_cores=True)
    assert any(message in problem for problem in found), found


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8MOE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_a_spilling_kernel_does_not_build(own_cache: Path) -> None:
    with pytest.raises(jit.CompileError, match="spill"):
        jit.compile(make_spec(own_cache, SPILL_SOURCE, "spill"))


def test_spills_are_seen_in_the_log_and_the_sass(own_cache: Path) -> None:
    spec = make_spec(own_cache, SPILL_SOURCE, "spill")
    options = tuple(o for o in jit.OPTIONS if "Werror" not in o)
    cubin, log = jit._nvrtc(jit.render(spec), "spill.cuh", options)
    assert cubin is not None
    text = "; ".join(problems(spec, jit.Compiled(cubin, log), tensor_cores=False))
    assert "spills" in text and "stack" in text and "LDL, STL" in text


def test_local_memory_without_a_spill_is_seen(own_cache: Path) -> None:
    spec = make_spec(own_cache, LOCAL_SOURCE, "local")
    text = "; ".join(problems(spec, jit.compile(spec), tensor_cores=False))
    assert "stack" in text and "LDL, STL" in text and "spills" not in text


def test_a_plain_kernel_is_no_tensor_core_kernel(own_cache: Path) -> None:
    spec = make_spec(own_cache, PLAIN_SOURCE, "plain")
    compiled = jit.compile(spec)
    assert problems(spec, compiled, tensor_cores=False) == []
    text = "; ".join(problems(spec, compiled, tensor_cores=True))
    assert "lacks QGMMA, SYNCS, USETMAXREG, UTMALDG" in text and "registers" in text
