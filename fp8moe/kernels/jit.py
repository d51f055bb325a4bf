"""Rendering, compilation (NVRTC for sm_90a) and loading of kernels.

Compiling needs no GPU and no driver. A kernel that spills registers, or whose ``wgmma`` the
assembler serialises, is a build failure: both cost more than they look and creep in unnoticed.

Source: our own measurements. NVRTC releases Python's interpreter lock and compiles in parallel from
threads (two kernels take the wall time of one), so the warm-up uses threads, not processes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fp8moe.kernels import disk_cache, launch, sass

CSRC = Path(__file__).parent / "csrc"
ARCH = "sm_90a"
OPTIONS: tuple[str, ...] = (
    f"--gpu-architecture={ARCH}",
    "-std=c++17",
    "-default-device",
    # A kernel from the driver's own cache comes without the log that is checked here.
    "--no-cache",
    "--ptxas-options=-v",
    "--ptxas-options=-warn-spills",
    "--ptxas-options=-Werror",
)

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*$')
_PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\s*$")
# "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized ...",
# "(C7508) setmaxnreg ignored ..."
_PERFORMANCE_LOSS = re.compile(r"\bC75\d\d\b")


@dataclass(frozen=True)
class KernelSpec:
    """One kernel configuration: a source file, an entry point and compile-time constants.

    Args:
        source: file name in ``csrc``, or an absolute path.
        entry: name of the ``extern "C" __global__`` function.
        constants: rendered as ``#define NAME value`` before the source, in this order.
        hold_operands: rewrite issue hints of the compiled code, see ``sass``.
    """

    source: str
    entry: str
    constants: tuple[tuple[str, int | str], ...] = ()
    hold_operands: bool = False

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{Path(self.source).name}:{self.entry}({values})"


@dataclass(frozen=True)
class Compiled:
    """An sm_90a cubin and the compiler's log, which has the registers of each kernel."""

    cubin: bytes
    log: str


@dataclass(frozen=True)
class Usage:
    """What one entry point uses, from the assembler's log."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class Warmed:
    """The outcome of one kernel of a warm-up; exactly one of ``compiled`` and ``error`` is set."""

    spec: KernelSpec
    time_s: float
    compiled: Compiled | None = None
    error: CompileError | None = None


class CompileError(RuntimeError):
    """A kernel did not compile. ``log`` is the compiler's, ``path`` the rendered source."""

    def __init__(self, spec: KernelSpec, reason: str, log: str, path: Path | None) -> None:
        where = str(path) if path else "not written: no writable directory"
        super().__init__(f"{spec}: {reason}\nrendered source: {where}\n{log.strip()}")
        self.spec = spec
        self.log = log
        self.path = path


def render(spec: KernelSpec) -> str:
    """The text given to NVRTC: ``#define``s, then the source with our headers inlined once each.

    ``#line`` directives keep the compiler's messages on the files in ``csrc``.

    Raises: FileNotFoundError for a source or header that does not exist.
    """
    lines = [f"#define {name} {value}" for name, value in spec.constants]
    seen: set[Path] = set()

    def inline(path: Path) -> None:
        seen.add(path)
        lines.append(f'#line 1 "{path.name}"')
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            match = _INCLUDE.match(line)
            if match:
                header = (path.parent / match[1]).resolve()
                if not header.is_file():
                    raise FileNotFoundError(f"{path}:{number}: no header {header}")
                if header not in seen:
                    inline(header)
                    lines.append(f'#line {number + 1} "{path.name}"')
                else:
                    lines.append("")
            else:
                lines.append("" if _PRAGMA_ONCE.match(line) else line)

    inline((CSRC / spec.source).resolve())
    return "\n".join(lines) + "\n"


def usage(log: str) -> dict[str, Usage]:
    """Entry point -> registers, stack and spills, read from the assembler's ``-v`` output."""
    found: dict[str, Usage] = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<entry>[^']+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    for match in pattern.finditer(log):
        found[match["entry"]] = Usage(
            registers=int(match["registers"]),
            stack_bytes=int(match["stack"]),
            spill_store_bytes=int(match["stores"]),
            spill_load_bytes=int(match["loads"]),
        )
    return found


# -------------------------------------------------------------------------------------------- NVRTC


@functools.cache
def compiler() -> tuple[str, str]:
    """(version, path) of the NVRTC that is used.

    Raises: RuntimeError when there is none or it is too old, saying what to install.
    """
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError as error:
        raise RuntimeError(f"NVRTC: expected the package cuda-python>=13, got {error}") from error
    try:
        path = load_nvidia_dynamic_lib("nvrtc").abs_path or ""
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"NVRTC: expected the package nvidia-cuda-nvrtc>=13.0.88, got {first_line}"
        ) from error
    if (major, minor) < (13, 0):
        raise RuntimeError(f"NVRTC: expected 13.0 or later, got {major}.{minor} at {path}")
    return _full_version(path, f"{major}.{minor}"), path


def _full_version(path: str, version: str) -> str:
    """``13.0.88`` rather than ``13.0`` when the library came from the pip package."""
    import importlib.metadata

    try:
        package = importlib.metadata.distribution("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return version
    if path and Path(str(package.locate_file(""))).resolve() in Path(path).resolve().parents:
        return package.version
    return version


@functools.cache
def _compiler_fingerprint() -> str:
    # NVRTC itself only reports major.minor; the library's size tells patch releases apart.
    version, path = compiler()
    size = os.path.getsize(path) if path and os.path.exists(path) else 0
    return f"{version}/{size}"


def _nvrtc(source: str, name: str, options: tuple[str, ...]) -> tuple[bytes | None, str]:
    """(cubin or None when it did not compile, log)."""
    compiler()
    from cuda.bindings import nvrtc

    def ok(result: tuple) -> tuple:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC failed internally: {result[0].name} for {name}")
        return result[1:]

    (program,) = ok(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, None, None))
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        (log_size,) = ok(nvrtc.nvrtcGetProgramLogSize(program))
        log = bytearray(log_size)
        ok(nvrtc.nvrtcGetProgramLog(program, log))
        text = bytes(log).rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return None, text or status.name
        (cubin_size,) = ok(nvrtc.nvrtcGetCUBINSize(program))
        cubin = bytearray(cubin_size)
        ok(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


# --------------------------------------------------------------------------------------- disk cache


@functools.cache
def _hints() -> str:
    return Path(sass.__file__).read_text(encoding="utf-8")


def _name(spec: KernelSpec, source: str) -> str:
    parts = (source, *OPTIONS, _compiler_fingerprint(), _hints() if spec.hold_operands else "")
    key = hashlib.sha256("\0".join(parts).encode())
    return f"{Path(spec.source).stem}-{key.hexdigest()[:40]}"


def cache_path(spec: KernelSpec) -> Path:
    """The cache file of ``spec``; its name is a hash of the rendered source, the options (with the
    architecture), the NVRTC build and, for ``hold_operands``, of ``sass``."""
    return disk_cache.path(_name(spec, render(spec)))


def _encode(compiled: Compiled) -> bytes:
    return json.dumps({"log": compiled.log}).encode() + b"\n" + compiled.cubin


def _decode(data: bytes) -> Compiled:
    header, _, cubin = data.partition(b"\n")
    return Compiled(cubin=cubin, log=json.loads(header)["log"])


def _keep_source(name: str, source: str) -> Path | None:
    """Write the rendered source of a failed kernel where the user can read it."""
    for directory in (disk_cache.directory(), Path(tempfile.gettempdir())):
        path = directory / f"{name}.cu"
        try:
            disk_cache.write_atomically(path, source.encode())
        except OSError:
            continue
        return path
    return None


# ------------------------------------------------------------------------------------- entry points


def compile(spec: KernelSpec) -> Compiled:
    """The sm_90a cubin of ``spec``, from the disk cache or compiled now; needs no GPU.

    Raises: CompileError with the log and the path of the rendered source, also for spilled
        registers and serialised ``wgmma``; RuntimeError when there is no usable NVRTC.
    """
    source = render(spec)
    name = _name(spec, source)
    # Specs that differ only in their entry share a file: threads compile it once between them.
    with _compiling_lock:
        lock = _compiling.setdefault(name, threading.Lock())
    with lock:
        cached = disk_cache.read(name)
        if cached is not None:
            return _checked_entry(spec, _decode(cached), name, source)
        return _compile(spec, name, source)


_compiling: dict[str, threading.Lock] = {}
_compiling_lock = threading.Lock()


def _checked_entry(spec: KernelSpec, compiled: Compiled, name: str, source: str) -> Compiled:
    if f"Compiling entry function '{spec.entry}'" not in compiled.log:
        reason = f'rejected: there is no extern "C" __global__ function {spec.entry}'
        raise CompileError(spec, reason, compiled.log, _keep_source(name, source))
    return compiled


def _compile(spec: KernelSpec, name: str, source: str) -> Compiled:
    cubin, log = _nvrtc(source, Path(spec.source).name, OPTIONS)
    if cubin is None:
        raise CompileError(spec, "did not compile", log, _keep_source(name, source))
    if _PERFORMANCE_LOSS.search(log):
        reason = "rejected: the assembler serialised wgmma or ignored setmaxnreg"
        raise CompileError(spec, reason, log, _keep_source(name, source))
    if spec.hold_operands:
        cubin = sass.hold_operands(cubin)
    compiled = _checked_entry(spec, Compiled(cubin=cubin, log=log), name, source)
    disk_cache.write(name, _encode(compiled))
    return compiled


_loaded: dict[KernelSpec, launch.Kernel] = {}
_loading = threading.Lock()


def load(spec: KernelSpec) -> launch.Kernel:
    """The launchable kernel of ``spec``, compiled at most once and cached in this process.

    Raises: CompileError; RuntimeError when there is no NVRTC or no CUDA driver.
    """
    kernel = _loaded.get(spec)
    if kernel is None:
        with _loading:
            kernel = _loaded.get(spec)
            if kernel is None:
                kernel = _loaded[spec] = launch.Kernel(compile(spec).cubin, spec.entry)
    return kernel


def default_jobs() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warmup(
    specs: Iterable[KernelSpec],
    jobs: int | None = None,
    on_done: Callable[[Warmed], None] | None = None,
) -> list[Warmed]:
    """Compile ``specs`` into the disk cache, ``jobs`` at a time (default: one per core).

    Args:
        specs: kernels to compile; repetitions are compiled once.
        jobs: threads.
        on_done: called in a worker thread after each kernel, for progress.

    Returns: one result per distinct spec, in order. A kernel that does not compile has its error in
        the result, so that the others are still compiled.

    Raises: RuntimeError when there is no usable NVRTC; ValueError for ``jobs`` below 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    compiler()

    def one(spec: KernelSpec) -> Warmed:
        start = time.perf_counter()
        try:
            compiled, error = compile(spec), None
        except CompileError as failure:
            compiled, error = None, failure
        result = Warmed(spec, time.perf_counter() - start, compiled, error)
        if on_done is not None:
            on_done(result)
        return result

    with ThreadPoolExecutor(max_workers=jobs or default_jobs()) as pool:
        return list(pool.map(one, dict.fromkeys(specs)))
