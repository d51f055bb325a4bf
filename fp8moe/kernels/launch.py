"""Argument packing and launches through the CUDA driver.

A launch goes through ``cuLaunchKernelEx`` with a cached launch configuration and arguments packed
into memory that was laid out once: the driver's Python bindings then cost well under a microsecond,
against several for rebuilding either.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fp8moe.kernels.driver import checked, driver, lacked_context
from fp8moe.kernels.tma import TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES, TensorMap

Dim = int | tuple[int, ...]

_DEFAULT_SMEM_BYTES = 48 * 1024
_MAX_CONFIGS = 1024


@functools.cache
def _layout(codes: tuple[str, ...]) -> tuple[struct.Struct, list[int], list[int]]:
    """The arguments' struct, and the offset and size of each."""
    layout = "@"
    offsets = []
    for code in codes:
        if code.endswith("s"):
            align = TENSOR_MAP_ALIGN if code == f"{TENSOR_MAP_BYTES}s" else 8
            layout += f"{-struct.calcsize(layout) % align}x"
        layout += code
        offsets.append(struct.calcsize(layout) - struct.calcsize("@" + code))
    return struct.Struct(layout), offsets, [struct.calcsize("@" + code) for code in codes]


class ArgumentFrame:
    """Memory for one call's arguments, laid out for a sequence of ``struct`` codes.

    ``address`` is the ``void**`` that the driver takes: an array with the address of each argument.
    """

    def __init__(self, codes: Sequence[str]) -> None:
        self.codes = tuple(codes)
        self._struct, offsets, self.sizes = _layout(self.codes)
        self._memory = ctypes.create_string_buffer(self._struct.size + TENSOR_MAP_ALIGN)
        self._start = -ctypes.addressof(self._memory) % TENSOR_MAP_ALIGN
        base = ctypes.addressof(self._memory) + self._start
        self._pointers = (ctypes.c_void_p * max(len(codes), 1))(*[base + o for o in offsets])
        self.address = ctypes.addressof(self._pointers)

    def fill(self, values: Sequence[Any]) -> None:
        """Pack `values`. Raises: ValueError naming the one that does not fit its type."""
        try:
            self._struct.pack_into(self._memory, self._start, *values)
        except struct.error as error:
            raise _name_overflow(self.codes, values, error) from None

    def read(self, index: int) -> bytes:
        """The bytes of one argument as the driver will copy them."""
        return ctypes.string_at(self._pointers[index] or 0, self.sizes[index])


def encode(args: Sequence[Any]) -> tuple[list[str], list[Any], int]:
    """(struct codes, values, device index or -1) of kernel arguments.

    Args:
        args: a CUDA tensor (its address), None (a null pointer), int (int32), float (float32), a
            ctypes scalar (as it is), a TensorMap (128 bytes by value), or bytes (a struct by value,
            aligned to 8).

    Raises: TypeError for another type; ValueError for tensors on two devices or not on a GPU.
    """
    codes = []
    values: list[Any] = []
    device = -1
    for position, arg in enumerate(args):
        kind = type(arg)  # exact types first: isinstance of a tensor class is a slow Python call
        if kind is int:
            codes.append("i")
            values.append(arg)
        elif arg is None:
            codes.append("P")
            values.append(0)
        elif kind is TensorMap:
            codes.append("128s")
            values.append(arg.data)
        elif kind is bytes:
            codes.append(f"{len(arg)}s")
            values.append(arg)
        elif kind is ctypes.c_void_p:
            codes.append("P")
            values.append(arg.value or 0)
        elif kind is float:
            codes.append("f")
            values.append(arg)
        elif kind is torch.Tensor or isinstance(arg, torch.Tensor):
            index = arg.get_device()
            if index < 0 or index != device >= 0:
                expected = f"cuda:{device}" if device >= 0 else "a CUDA tensor"
                raise ValueError(
                    f"kernel argument {position}: expected {expected}, got a tensor on {arg.device}"
                )
            device = index
            codes.append("P")
            values.append(arg.data_ptr())
        elif isinstance(arg, int):  # bool, IntEnum
            codes.append("i")
            values.append(int(arg))
        elif isinstance(arg, ctypes._SimpleCData):
            codes.append(arg._type_)  # type: ignore[attr-defined]
            values.append(arg.value)
        else:
            raise TypeError(
                f"kernel argument {position}: expected a tensor, None, int, float, ctypes scalar, "
                f"TensorMap or bytes, got {type(arg).__name__}"
            )
    return codes, values, device


def _name_overflow(codes: Sequence[str], values: Sequence[Any], error: Exception) -> Exception:
    """The error for the argument that does not fit its type."""
    for position, (code, value) in enumerate(zip(codes, values, strict=True)):
        try:
            struct.pack("@" + code, value)
        except struct.error:
            hint = "; pass an address as ctypes.c_void_p" if code == "i" else ""
            return ValueError(
                f"kernel argument {position}: expected a value that fits the C type {code!r}, "
                f"got {value}{hint}"
            )
    return error


_READ = {int: "a[{}]", float: "a[{}]", type(None): "0", TensorMap: "a[{}].data", bytes: "a[{}]"}


def reader(kinds: tuple[type, ...]) -> Callable[[Sequence[Any]], tuple[int, Sequence[Any]]]:
    """(device index or -1, values) as `encode` gives them, for arguments of these types.

    `encode` finds out the type of every argument at every launch, which takes microseconds. Types
    repeat, so they are looked at once and turned into one expression. Arguments must have passed
    `encode` once; a device index of -2 stands for tensors on two devices.
    """
    values, devices = [], []
    for i, kind in enumerate(kinds):
        if issubclass(kind, torch.Tensor):
            values.append(f"a[{i}].data_ptr()")
            devices.append(f"a[{i}].get_device()")
        elif kind is ctypes.c_void_p:
            values.append(f"a[{i}].value or 0")
        elif issubclass(kind, ctypes._SimpleCData):
            values.append(f"a[{i}].value")
        else:
            values.append(_READ.get(kind, "int(a[{}])").format(i))
    device = "-1"
    if devices:
        device = f"{devices[0]} if {' == '.join([*devices, devices[0]])} else -2"
    return eval(f"lambda a: ({device}, ({''.join(v + ', ' for v in values)}))")


# ------------------------------------------------------------------------------------------- launch


def _dim3(dim: Dim) -> tuple[int, int, int]:
    if isinstance(dim, int):
        return dim, 1, 1
    x, y, z = (*dim, 1, 1)[:3]
    return x, y, z


class Kernel:
    """A loaded kernel: ``kernel(grid, block, args, smem=bytes)``."""

    def __init__(self, cubin: bytes, entry: str) -> None:
        cu = driver()
        self.entry = entry
        self._cu = cu
        (self._library,) = checked(
            cu.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), "cuLibraryLoadData"
        )
        (self._kernel,) = checked(
            cu.cuLibraryGetKernel(self._library, entry.encode()), "cuLibraryGetKernel"
        )
        self._parameter_bytes = self._parameters()
        self._configs: dict[tuple, Any] = {}
        self._smem: dict[int, int] = {}
        # The driver copies the arguments while the interpreter lock is released, and the backward
        # pass runs in a thread of its own: each thread packs into its own memory.
        self._local = threading.local()

    def _parameters(self) -> list[int]:
        sizes: list[int] = []
        while True:
            result = self._cu.cuKernelGetParamInfo(self._kernel, len(sizes))
            if lacked_context(result[0], torch.cuda.current_device()):
                result = self._cu.cuKernelGetParamInfo(self._kernel, len(sizes))
            if result[0] == self._cu.CUresult.CUDA_ERROR_INVALID_VALUE:
                return sizes
            _, size = checked(result, "cuKernelGetParamInfo")
            sizes.append(size)

    def _frame(self, args: Sequence[Any]) -> tuple[ArgumentFrame, list[Any], int]:
        """Memory for `args`, their values, and the index of their device or -1."""
        codes, values, device = encode(args)
        frame = ArgumentFrame(codes)
        if frame.sizes != self._parameter_bytes:
            raise TypeError(
                f"{self.entry}: expected arguments of {self._parameter_bytes} bytes, "
                f"got {frame.sizes}"
            )
        return frame, values, device

    def _pack(self, args: Sequence[Any]) -> tuple[ArgumentFrame, int]:
        """The thread's frame that now holds `args`, and the index of their device or -1."""
        frames: dict[tuple[type, ...], tuple[ArgumentFrame, Callable]]
        try:
            frames = self._local.frames
        except AttributeError:
            frames = self._local.frames = {}
        kinds = tuple(map(type, args))
        frame, read = frames.get(kinds, (None, None))
        if read is not None:
            device, values = read(args)
        if frame is None or device == -2:
            frame, values, device = self._frame(args)  # raises for tensors on two devices
            frames[kinds] = frame, reader(kinds)
        frame.fill(values)
        return frame, device

    def _config(self, grid: Dim, block: Dim, smem: int, stream: int) -> Any:
        cu = self._cu
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = _dim3(grid)
        config.blockDimX, config.blockDimY, config.blockDimZ = _dim3(block)
        config.sharedMemBytes = smem
        config.hStream = cu.CUstream(stream)
        return config

    def _allow_smem(self, smem: int, device: int) -> None:
        cu = self._cu
        (handle,) = checked(cu.cuDeviceGet(device), "cuDeviceGet")
        attribute = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(
            cu.cuKernelSetAttribute(attribute, smem, self._kernel, handle),
            f"{self.entry}: {smem} bytes of shared memory",
        )
        self._smem[device] = smem

    def __call__(self, grid: Dim, block: Dim, args: Sequence[Any], *, smem: int = 0) -> None:
        """Launch on the current stream of the tensors' device; a zero in ``grid`` launches nothing.

        Args:
            grid: blocks, up to three dimensions.
            block: threads per block, up to three dimensions.
            args: see ``encode``.
            smem: bytes of dynamic shared memory.

        Raises: TypeError for arguments that do not match the kernel's parameters; ValueError for a
            value that does not fit its type or a tensor on the wrong device; DriverError.
        """
        if grid == 0 or (not isinstance(grid, int) and 0 in grid):
            return
        self._start(grid, block, smem, *self._pack(args))

    def prepare(
        self, grid: int, block: int, args: Sequence[Any], *, smem: int = 0
    ) -> Callable[[], None]:
        """`__call__` with these arguments, in memory of its own that nothing changes any more: each
        call of the result launches on the current stream of then."""
        frame, values, device = self._frame(args)
        frame.fill(values)
        return functools.partial(self._start, grid, block, smem, frame, device)

    def _start(self, grid: Dim, block: Dim, smem: int, frame: ArgumentFrame, device: int) -> None:
        if device < 0:
            device = torch.cuda.current_device()
        elif device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self._start(grid, block, smem, frame, device)
        if smem > _DEFAULT_SMEM_BYTES and smem > self._smem.get(device, 0):
            self._allow_smem(smem, device)
        stream = torch._C._cuda_getCurrentRawStream(device)
        key = (grid, block, smem, stream)
        config = self._configs.get(key)
        if config is None:
            if len(self._configs) >= _MAX_CONFIGS:
                self._configs.clear()
            config = self._configs[key] = self._config(grid, block, smem, stream)
        (result,) = self._cu.cuLaunchKernelEx(config, self._kernel, frame.address, 0)
        if result.value != 0 and lacked_context(result, device):
            (result,) = self._cu.cuLaunchKernelEx(config, self._kernel, frame.address, 0)
        if result.value != 0:
            checked((result,), f"{self.entry}: launch with grid {grid}, block {block}")
