"""The `emulated` fixture: the kernels' own source, compiled for the CPU and run there.

Without a GPU this executes the real index arithmetic, masks, shuffles and rounding, and the Python
code that launches them. See emulator.h for what it can and cannot show.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fp8moe.kernels import gemm, jit, launch, status, tma

HEADER = Path(__file__).with_name("emulator.h")
# Misaligned vector accesses work on this CPU and fault on the GPU: emulator.h has the handler.
ALIGNMENT = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")
OPTIONS = ("-std=c++20", "-O1", "-fPIC", "-w", "-ffp-contract=off", *ALIGNMENT)

# What each piece of inline PTX means; %N are its operands. Strings joined, white space squeezed.
PTX = {
    "cvt.f32.f16 %0, %1;": "%0 = emulator::from_f16(%1)",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": (
        "%0 = emulator::pair16(emulator::to_bf16(%2), emulator::to_bf16(%1))"
    ),
    "cvt.rn.f16x2.f32 %0, %1, %2;": (
        "%0 = emulator::pair16(emulator::to_f16(%2), emulator::to_f16(%1))"
    ),
    "max.u16x2 %0, %1, %2;": "%0 = emulator::max_u16x2(%1, %2)",
    "mul.rn.f16x2 %0, %1, %2;": "%0 = emulator::mul_f16x2(%1, %2)",
    "mul.rn.bf16x2 %0, %1, %2;": "%0 = emulator::mul_bf16x2(%1, %2)",
    "max.NaN.xorsign.abs.bf16x2 %0, %1, %2;": "%0 = emulator::max_xorsign_abs_bf16x2(%1, %2)",
    "{ .reg .b32 x, y; abs.f16x2 x, %1; abs.f16x2 y, %2; max.NaN.f16x2 %0, x, y; }": (
        "%0 = emulator::max_abs_16x2(%1, %2, 0x7C00)"
    ),
    # One unit off on purpose: the hardware's approximation promises no better.
    "rcp.approx.ftz.f32 %0, %1;": "%0 = std::nextafter(1.0f / (%1), 0.0f)",
    "ex2.approx.ftz.f32 %0, %1;": "%0 = std::exp2(%1)",
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; "
    "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; mov.b32 %0, {low, high}; }": (
        "%0 = emulator::pair16(emulator::e4m3x2(%1, %2), emulator::e4m3x2(%3, %4))"
    ),
    "cvt.rn.f16x2.e4m3x2 %0, %1;": "%0 = emulator::f16x2_of_e4m3x2(%1)",
    "{ .reg .b16 low, high; mov.b32 {low, high}, %2; "
    "cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }": (
        "%0 = emulator::f16x2_of_e4m3x2((uint16_t)(%2)), %1 = emulator::f16x2_of_e4m3x2((%2) >> 16)"
    ),
    "cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;": "%0 = emulator::e4m3x2_of_f16x2(%1)",
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f16x2 low, %1; "
    "cvt.rn.satfinite.e4m3x2.f16x2 high, %2; mov.b32 %0, {low, high}; }": (
        "%0 = emulator::pair16(emulator::e4m3x2_of_f16x2(%1), emulator::e4m3x2_of_f16x2(%2))"
    ),
    "ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];": (
        "uint4 read = emulator::read<uint4>(%4); %0 = read.x, %1 = read.y, %2 = read.z, %3 = read.w"
    ),
    "{ .reg .pred valid; setp.ne.s32 valid, %5, 0; "
    "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; "
    "@valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }": (
        "uint4 read = emulator::read_if(%4, %5); %0 = read.x, %1 = read.y, %2 = read.z, %3 = read.w"
    ),
    "st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};": (
        "emulator::write(%0, make_uint4(%1, %2, %3, %4))"
    ),
    "st.global.cs.u32 [%0], %1;": "emulator::write<unsigned>(%0, %1)",
    "st.global.cs.f32 [%0], %1;": "emulator::write<float>(%0, %1)",
    "cp.async.cg.shared.global [%0], [%1], 16, %2;": "emulator::copy_async<uint4>(%0, %1, %2)",
    "cp.async.ca.shared.global [%0], [%1], 8, %2;": "emulator::copy_async<uint2>(%0, %1, %2)",
    "{ .reg .pred valid; setp.ne.s32 valid, %5, 0; "
    "@valid st.global.v4.u32 [%0], {%1, %2, %3, %4}; }": (
        "if (%5) emulator::write(%0, make_uint4(%1, %2, %3, %4))"
    ),
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};": (
        "emulator::store_matrix(%0, {%1, %2, %3, %4})"
    ),
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};": (
        "emulator::store_matrix_transposed(%0, {%1, %2, %3, %4})"
    ),
    "": "",
    "cp.async.commit_group;": "",
    "cp.async.wait_group %0;": "",
}

# The asynchronous instructions, by a part of their text; in terms of the names that csrc/ptx.cuh
# gives its parameters.
ASYNCHRONOUS = {
    "mbarrier.init": "emulator::barrier_init(bar, count)",
    "mbarrier.arrive.expect_tx": "emulator::barrier_update(bar, 1, bytes)",
    "mbarrier.arrive.shared::cta": "emulator::barrier_update(bar, 1, 0)",
    "mbarrier.try_wait": "emulator::barrier_wait(bar, parity)",
    "cp.async.mbarrier.arrive.noinc": "emulator::barrier_update(bar, 1, 0)",
    "cp.async.ca.shared.global [%0], [%1], 4, %2": (
        "emulator::copy_async<unsigned>(dst, src, valid ? 4 : 0)"
    ),
    "barrier.sync.aligned": "emulator::meet(emulator::here->named[id], COUNT)",
    "cp.async.bulk.tensor.2d.shared": "emulator::tma_load(dst, map, x, y, bar)",
    "cp.async.bulk.tensor.4d.shared": "emulator::tma_load(dst, map, x, group, bar)",
    "cp.async.bulk.tensor.5d.shared": "emulator::tma_load(dst, map, x, group, bar)",
    "cp.async.bulk.tensor.2d.global": "emulator::tma_store(map, src, x, y)",
    "cp.reduce.async.bulk.tensor.2d.global": "emulator::tma_add(map, src, x, y)",
    "wgmma.mma_async": "emulator::wgmma(d, a, b, accumulate)",
    "red.relaxed.gpu.global.add.v4": ("dst[0] += v.x, dst[1] += v.y, dst[2] += v.z, dst[3] += v.w"),
    "%%cluster_ctarank": "rank = emulator::cluster_rank()",
    "barrier.cluster": "emulator::meet_cluster()",
    "mapa": "there = emulator::cluster_address(address, rank)",
    "ld.shared::cluster": "v = emulator::load_cluster(address)",
    "st.shared.v4.f32": "emulator::write((char*)emulator::here->shared + address, v)",
} | dict.fromkeys(
    (
        "fence.",
        "prefetch.tensormap",
        "cp.async.bulk.commit_group",
        "cp.async.bulk.wait_group",
        "wgmma.fence",
        "wgmma.commit_group",
        "wgmma.wait_group",
        "setmaxnreg",
    ),
    "",
)

_ASM = re.compile(r"\basm\s*(?:volatile)?\s*\(")
_ENTRY = re.compile(
    r'extern "C" __global__ void\s+(?:CLUSTER\s+)?'
    r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


class CannotRunError(Exception):
    """A source that is no C++, or none that the emulation knows, or lacks what is to be replaced.

    Neither an AssertionError nor a RuntimeError, which the tests of planted errors expect: a plant
    that is not there or does not even compile shows nothing.
    """


def plant(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    """Every kernel is compiled with `wrong` in the place of `right`."""
    render = jit.render

    def planted(spec: jit.KernelSpec) -> str:
        source = render(spec)
        if right not in source:
            raise CannotRunError(f"{spec.source}: nothing to replace, {right!r} is not there")
        return source.replace(right, wrong)

    monkeypatch.setattr(jit, "render", planted)


def _split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside of strings and brackets."""
    parts, depth, quoted, start = [], 0, False, 0
    for i, char in enumerate(text):
        if char == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and char in "([{":
            depth += 1
        elif not quoted and char in ")]}":
            depth -= 1
        elif not quoted and not depth and char == separator:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _close(text: str, start: int) -> int:
    """The position after the bracket that closes the one before `start`."""
    depth, quoted = 1, False
    for i in range(start, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and text[i] in "()":
            depth += 1 if text[i] == "(" else -1
            if depth == 0:
                return i + 1
    raise ValueError("unbalanced brackets")


def _meaning(asm: str) -> str:
    """C++ for the inside of one `asm(...)`."""
    template, *operands = _split(asm, ":")
    strings = "".join(_STRING.findall(template)).replace("\\n", " ")
    ptx = " ".join(strings.split())
    for part, meaning in ASYNCHRONOUS.items():
        if part in ptx:
            return f"do {{ {meaning}; }} while (0)"
    if ptx not in PTX:
        raise CannotRunError(f"{Path(__file__).name}: PTX has no meaning for {ptx!r}")
    values = [
        operand[operand.index("(") : operand.rindex(")") + 1]
        for group in operands[:2]
        for operand in _split(group, ",")
        if operand.strip()
    ]
    meaning = re.sub(r"%(\d)", lambda m: values[int(m[1])], PTX[ptx])
    return f"do {{ {meaning}; }} while (0)"


def host_source(spec: jit.KernelSpec) -> str:
    """The kernel's source as C++ for the CPU, with a function `run_<entry>` for each entry."""
    text = jit.render(spec)
    text = re.sub(r"^#line.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"//.*$", "", text, flags=re.MULTILINE)
    while match := _ASM.search(text):
        end = _close(text, match.end())
        text = text[: match.start()] + _meaning(text[match.end() : end - 1]) + text[end:]
    # Static shared memory is static memory: without clusters one block runs at a time.
    text = re.sub(
        r"extern __shared__\s+(?:__align__\(\d+\)|alignas\(\d+\))?\s*(\w+) (\w+)\[\];",
        r"\1* const \2 = (\1*)emulator::here->shared;",
        text,
    )
    text = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", text)
    text = re.sub(r"__shared__\b", "static", text)
    cluster = re.search(r"__cluster_dims__\(([^,]+), 1, 1\)", text)
    blocks = cluster[1] if cluster else "1"
    runs = [
        f'extern "C" const char* run_{entry}(unsigned x, unsigned y, unsigned z, int threads, '
        f"void** args) {{ return emulator::run({entry}, args, {{x, y, z}}, threads, {blocks}) "
        f"? nullptr : emulator::message; }}\n"
        f'extern "C" int sizes_{entry}(int* sizes) {{ '
        f"return emulator::parameter_sizes({entry}, sizes); }}\n"
        for entry in _ENTRY.findall(text)
    ]
    allow = (
        'extern "C" void readable(uintptr_t begin, size_t bytes) { '
        "if (begin == 0) emulator::readable.clear(); "
        "else emulator::readable.push_back({begin, begin + bytes}); }\n"
    )
    return f'#include "{HEADER.name}"\n{text}\n{allow}{"".join(runs)}'


class EmulatedKernel:
    """Called like `launch.Kernel`, with CPU tensors."""

    def __init__(self, library: ctypes.CDLL, entry: str, readable: list[torch.Tensor]) -> None:
        self.entry = entry
        self._readable = readable
        self._library = library
        self._run = getattr(library, f"run_{entry}")
        self._run.restype = ctypes.c_char_p
        sizes = (ctypes.c_int * 64)()
        count = getattr(library, f"sizes_{entry}")(sizes)
        self._parameter_bytes = list(sizes[:count])

    def __call__(
        self,
        grid: launch.Dim,
        block: int,
        args: Sequence[Any],
        *,
        smem: int = 0,
    ) -> None:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        codes, values, _ = launch.encode(
            [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
        )
        frame = launch.ArgumentFrame(codes)
        assert frame.sizes == self._parameter_bytes, (self.entry, frame.sizes)
        frame.fill(values)
        allow = self._library.readable
        allow(ctypes.c_size_t(0), ctypes.c_size_t(0))
        for tensor in (*tensors, *self._readable):
            if tensor.numel():
                storage = tensor.untyped_storage()
                allow(ctypes.c_size_t(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()))
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        error = self._run(x, y, z, block, ctypes.c_void_p(frame.address))
        if error is not None:
            raise RuntimeError(f"{self.entry}: {error.decode()}")


class Forgetful(dict):
    """A cache that keeps nothing: a test may plant an error between two launches."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Compiles a spec's source once per test session."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    directory = tmp_path_factory.mktemp("emulated")
    libraries: dict[str, ctypes.CDLL] = {}

    def compile(*arguments: str | Path) -> None:
        command = [compiler, *OPTIONS, *map(str, arguments)]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        if done.returncode != 0:
            raise CannotRunError(done.stderr[:4000])

    # Precompiled: the standard headers are most of the compile time.
    for header in HEADER.parent.glob("*.h"):
        shutil.copy(header, directory)
    compile("-x", "c++-header", HEADER.name, "-o", f"{HEADER.name}.gch")

    def library(spec: jit.KernelSpec) -> ctypes.CDLL:
        source = host_source(spec)
        name = hashlib.sha256(source.encode()).hexdigest()[:16]
        if name not in libraries:
            path = directory / f"{name}.cpp"
            path.write_text(source)
            binary = path.with_suffix(".so")
            compile("-shared", path, "-o", binary)
            libraries[name] = ctypes.CDLL(str(binary))
        return libraries[name]

    return library


def fake_tensor_map(
    pointer: int,
    *,
    dtype: str,
    rows: int,
    cols: int,
    row_stride_bytes: int,
    box_rows: int,
    box_cols: int,
    swizzle: int,
    row_order: tuple[tuple[int, int], ...] = (),
) -> tma.TensorMap:
    """Stands in for `tma.tensor_map`: struct FakeMap of tensor_core.h."""
    element = {"u8": 1, "bf16": 2, "f32": 4}[dtype]
    values = (pointer, rows, cols, row_stride_bytes, box_rows, box_cols, element, swizzle)
    axes = [*row_order, *[(1, 0)] * (3 - len(row_order))]
    packed = struct.pack("8q6i", *values, *(n for axis in axes for n in axis))
    return tma.TensorMap(packed.ljust(tma.TENSOR_MAP_BYTES, b"\0"))


GUARD = 0xA5
BORDER = 64


class GuardedMemory:
    """Stands in for `torch.empty`: poison inside, and a border that must stay as it is."""

    def __init__(self) -> None:
        self._plain = torch.empty
        self._buffers: list[tuple[torch.Tensor, int, int]] = []

    def empty(self, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        shape = size if isinstance(size[0], int) else tuple(size[0])
        like = self._plain(shape, dtype=dtype or torch.get_default_dtype(), device="meta")
        count = like.numel() * like.element_size()
        if count == 0:
            return self._plain(shape, dtype=like.dtype)
        buffer = self._plain(count + 3 * BORDER, dtype=torch.uint8).fill_(GUARD)
        start = BORDER + -buffer.data_ptr() % BORDER
        self._buffers.append((buffer, start, start + count))
        # A storage of the tensor's own size, so that reads past its end are noticed too.
        inside = (ctypes.c_uint8 * count).from_address(buffer.data_ptr() + start)
        return torch.frombuffer(inside, dtype=torch.uint8).view(like.dtype).view(shape)

    def check(self) -> None:
        for buffer, start, end in self._buffers:
            assert (buffer[:start] == GUARD).all(), "write before the start of an output"
            assert (buffer[end:] == GUARD).all(), "write past the end of an output"


@pytest.fixture
def emulated(
    emulated_library: Callable, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., torch.Tensor]]:
    """`words = emulated(*modules)` makes their CUDA implementations run on CPU tensors.

    Outputs are full of poison, and a write outside of one fails the test. `words` is the status
    buffer. `emulated.readable` lists what kernels may read beside the tensors that they are given.
    """
    readable: list[torch.Tensor] = []
    memory = GuardedMemory()
    words = torch.zeros(status.WORDS, dtype=torch.int32)

    def load(spec: jit.KernelSpec) -> EmulatedKernel:
        return EmulatedKernel(emulated_library(spec), spec.entry, readable)

    def new_empty(
        like: torch.Tensor, size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any
    ) -> torch.Tensor:
        return memory.empty(size, dtype=dtype or like.dtype)

    def empty_strided(
        size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype, **_: Any
    ) -> torch.Tensor:
        assert tuple(stride) == (1, size[0])  # of a scale
        return memory.empty((size[1], size[0]), dtype=dtype).t()

    def start(*modules: ModuleType) -> torch.Tensor:
        monkeypatch.setattr(jit, "load", load)
        monkeypatch.setattr(tma, "tensor_map", fake_tensor_map)
        monkeypatch.setattr(gemm, "_prepared", Forgetful())
        monkeypatch.setattr(gemm, "_shape", gemm._shape.__wrapped__)
        monkeypatch.setattr(gemm, "num_sms", lambda device: 3)
        monkeypatch.setattr(status, "pointer", lambda device: ctypes.c_void_p(words.data_ptr()))
        monkeypatch.setattr(torch, "empty", memory.empty)
        monkeypatch.setattr(torch, "empty_strided", empty_strided)
        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        for module in modules:
            for name, value in list(vars(module).items()):
                if "kernel" in name and hasattr(value, "cache_clear"):
                    monkeypatch.setattr(module, name, value.__wrapped__)
        return words

    start.readable = readable  # type: ignore[attr-defined]
    yield start
    memory.check()
