"""Argument packing on the CPU, launches on a pretended driver and on a GPU."""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.kernels import driver, jit, launch, tma

MAP = tma.TensorMap(bytes(range(128)))


# ---------------------------------------------------------------------------------------- arguments


def packed(args: list[Any]) -> tuple[launch.ArgumentFrame, list[bytes]]:
    codes, values, _ = launch.encode(args)
    frame = launch.ArgumentFrame(codes)
    frame.fill(values)
    return frame, [frame.read(i) for i in range(len(args))]


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        (None, bytes(8)),
        (7, struct.pack("<i", 7)),
        (-(2**31), struct.pack("<i", -(2**31))),
        (True, struct.pack("<i", 1)),
        (1.5, struct.pack("<f", 1.5)),
        (ctypes.c_void_p(0x7F0012345678), struct.pack("<Q", 0x7F0012345678)),
        (ctypes.c_void_p(None), bytes(8)),
        (ctypes.c_int64(-3), struct.pack("<q", -3)),
        (ctypes.c_uint64(2**64 - 1), struct.pack("<Q", 2**64 - 1)),
        (ctypes.c_uint32(2**32 - 1), struct.pack("<I", 2**32 - 1)),
        (ctypes.c_double(0.1), struct.pack("<d", 0.1)),
        (ctypes.c_bool(True), b"\x01"),
        (MAP, MAP.data),
        (b"a struct of a kernel's own", b"a struct of a kernel's own"),
    ],
)
def test_one_argument_is_packed_as_its_c_type(arg: Any, expected: bytes) -> None:
    assert packed([arg])[1] == [expected]


def test_arguments_are_naturally_aligned_whatever_their_order() -> None:
    args = [1, None, MAP, ctypes.c_bool(True), 2.0, ctypes.c_int64(5), MAP, 3]
    frame, read = packed(args)
    assert [len(data) for data in read] == [4, 8, 128, 1, 4, 8, 128, 4]
    assert read[2] == read[6] == MAP.data and read[5] == struct.pack("<q", 5)
    pointers = (ctypes.c_void_p * len(args)).from_address(frame.address)
    for pointer, size in zip(pointers, frame.sizes, strict=True):
        assert pointer is not None and pointer % min(size, 64) == 0
    assert pointers[0] is not None and pointers[0] % 64 == 0


def test_a_struct_is_aligned_to_eight_bytes_and_read_again():
    args = [1, b"12345678abcd", 2]
    frame, read = packed(args)
    assert read == [struct.pack("<i", 1), b"12345678abcd", struct.pack("<i", 2)]
    pointers = (ctypes.c_void_p * 3).from_address(frame.address)
    assert pointers[1] is not None and pointers[1] % 8 == 0
    assert launch.reader(tuple(map(type, args)))(args) == (-1, tuple(args))


def test_no_arguments() -> None:
    assert packed([])[1] == []


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 0x7F0012345678, 2**100])
def test_int_out_of_range_names_the_argument(value: int) -> None:
    codes, values, _ = launch.encode([None, value])
    expected = f"argument 1: expected a value that fits the C type 'i', got {value};.*c_void_p"
    with pytest.raises(ValueError, match=expected):
        launch.ArgumentFrame(codes).fill(values)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="argument 1: expected a tensor, .* got str"):
        launch.encode([1, "x"])


def test_cpu_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 1: expected a CUDA tensor, got .* cpu"):
        launch.encode([1, torch.zeros(3)])


# ------------------------------------------------------------------- launches on a pretended driver


class PretendedDriver:
    """The real bindings' types, with functions that record what they are asked to do."""

    def __init__(self, parameter_bytes: list[int]) -> None:
        from cuda.bindings import driver as real

        self._real = real
        self._parameter_bytes = parameter_bytes
        self.launches: list[tuple[Any, list[bytes]]] = []
        self.attributes: list[int] = []
        self.contexts: list[str] = []
        self.results: list[Any] = []  # of the next launches
        self.parameter_results: list[Any] = []  # of the next cuKernelGetParamInfo

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def cuLibraryLoadData(self, *args: Any) -> tuple:
        return self.CUresult.CUDA_SUCCESS, "library"

    def cuLibraryGetKernel(self, library: str, name: bytes) -> tuple:
        return self.CUresult.CUDA_SUCCESS, name.decode()

    def cuKernelGetParamInfo(self, kernel: str, index: int) -> tuple:
        if self.parameter_results:
            return self.parameter_results.pop(0), None, None
        if index >= len(self._parameter_bytes):
            return self.CUresult.CUDA_ERROR_INVALID_VALUE, None, None
        return self.CUresult.CUDA_SUCCESS, 0, self._parameter_bytes[index]

    def cuDeviceGet(self, index: int) -> tuple:
        return self.CUresult.CUDA_SUCCESS, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple:
        return self.CUresult.CUDA_SUCCESS, f"context {device}"

    def cuCtxSetCurrent(self, context: str) -> tuple:
        self.contexts.append(context)
        return (self.CUresult.CUDA_SUCCESS,)

    def cuKernelSetAttribute(self, attribute: Any, value: int, *args: Any) -> tuple:
        self.attributes.append(value)
        return (self.CUresult.CUDA_SUCCESS,)

    def cuLaunchKernelEx(self, config: Any, kernel: str, address: int, extra: int) -> tuple:
        pointers = (ctypes.c_void_p * len(self._parameter_bytes)).from_address(address)
        sizes = self._parameter_bytes
        args = [ctypes.string_at(p or 0, n) for p, n in zip(pointers, sizes, strict=True)]
        self.launches.append((config, args))
        return (self.results.pop(0) if self.results else self.CUresult.CUDA_SUCCESS,)

    def cuGetErrorString(self, code: Any) -> tuple:
        return self.CUresult.CUDA_SUCCESS, b"said the driver"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> PretendedDriver:
    fake = PretendedDriver([8, 4, 4])
    for module in (launch, driver):
        monkeypatch.setattr(module, "driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0x77, raising=False)
    return fake


ARGS = [ctypes.c_void_p(0x1234), 5, 2.5]


def test_launch_configuration_and_arguments(pretended: PretendedDriver) -> None:
    kernel = launch.Kernel(b"", "k")
    kernel((3, 2), 128, ARGS, smem=1000)
    config, args = pretended.launches[0]
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (128, 1, 1)
    assert config.sharedMemBytes == 1000 and int(config.hStream) == 0x77
    assert args == [struct.pack("<Q", 0x1234), struct.pack("<i", 5), struct.pack("<f", 2.5)]
    assert pretended.attributes == []


def test_launch_reuses_its_configuration(pretended: PretendedDriver) -> None:
    kernel = launch.Kernel(b"", "k")
    for value in (1, 2):
        kernel(4, 32, [None, value, 0.0])
    kernel(5, 32, [None, 3, 0.0])
    configs = [config for config, _ in pretended.launches]
    assert configs[0] is configs[1] and configs[2] is not configs[0]
    assert [args[1] for _, args in pretended.launches] == [struct.pack("<i", v) for v in (1, 2, 3)]


def test_a_prepared_launch_keeps_its_arguments(pretended: PretendedDriver) -> None:
    kernel = launch.Kernel(b"", "k")
    prepared = kernel.prepare(4, 32, [None, 1, 0.0], smem=1000)
    assert not pretended.launches
    prepared()
    kernel(4, 32, [None, 2, 0.0], smem=1000)
    prepared()
    assert [args[1] for _, args in pretended.launches] == [struct.pack("<i", v) for v in (1, 2, 1)]
    assert pretended.launches[0][0] is pretended.launches[2][0]
    with pytest.raises(TypeError, match="k: expected arguments of"):
        kernel.prepare(4, 32, [None, 1])


def test_large_shared_memory_is_allowed_once_per_size(pretended: PretendedDriver) -> None:
    kernel = launch.Kernel(b"", "k")
    for smem in (48 * 1024, 100_000, 100_000, 60_000, 200_000):
        kernel(1, 32, ARGS, smem=smem)
    assert pretended.attributes == [100_000, 200_000]


def test_mismatched_arguments_do_not_launch(pretended: PretendedDriver) -> None:
    kernel = launch.Kernel(b"", "k")
    with pytest.raises(
        TypeError, match=r"k: expected arguments of \[8, 4, 4\] bytes, got \[8, 4\]"
    ):
        kernel(1, 32, ARGS[:2])
    with pytest.raises(ValueError, match=r"argument 1: .* pass an address as ctypes.c_void_p"):
        kernel(1, 32, [None, 2**40, 0.0])
    assert pretended.launches == []


def test_a_thread_without_a_context_gets_the_primary_one(pretended: PretendedDriver) -> None:
    pretended.results = [pretended.CUresult.CUDA_ERROR_INVALID_CONTEXT]
    launch.Kernel(b"", "k")(1, 32, ARGS)
    assert pretended.contexts == ["context 0"] and len(pretended.launches) == 2


def test_a_kernel_loads_in_a_thread_without_a_context(pretended: PretendedDriver) -> None:
    pretended.parameter_results = [pretended.CUresult.CUDA_ERROR_INVALID_CONTEXT]
    launch.Kernel(b"", "k")(1, 32, ARGS)
    assert pretended.contexts == ["context 0"] and len(pretended.launches) == 1


def test_a_failed_launch_names_the_kernel_and_the_reason(pretended: PretendedDriver) -> None:
    pretended.results = [pretended.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES]
    with pytest.raises(driver.DriverError) as caught:
        launch.Kernel(b"", "k")(7, 2048, ARGS)
    for part in ("k: launch with grid 7, block 2048", "OUT_OF_RESOURCES", "said the driver"):
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------------------- GPU

KERNELS = """
struct alignas(128) Map { char bytes[128]; };
extern "C" __global__ void mixed(float* y, const float* absent, int a, float b, long long c,
                                 const __grid_constant__ Map map, int d) {
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    y[0] = a; y[1] = b; y[2] = (float)c; y[3] = absent == nullptr; y[4] = map.bytes[127]; y[5] = d;
  }
}
extern "C" __global__ void big_smem(int* y) {
  extern __shared__ int s[];
  for (int i = threadIdx.x; i < 50000; i += blockDim.x) s[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < 50000; i += blockDim.x) y[i] = s[49999 - i];
}
extern "C" __global__ void add_one(int* y) { y[threadIdx.x] += 1; }
extern "C" __global__ void report(int* status) {
  status[1] = 3; status[2] = 10; status[3] = 20;
  __threadfence_system();
  status[0] = 1;
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("kernels") / "launch.cuh"
    path.write_text(KERNELS)
    yield lambda entry: jit.load(jit.KernelSpec(str(path), entry))


@pytest.mark.gpu
def test_all_kinds_of_arguments_arrive(kernels: Any) -> None:
    y = torch.zeros(6, device="cuda")
    kernels("mixed")((2, 1, 1), 32, [y, None, -7, 0.5, ctypes.c_int64(2**40), MAP, 9])
    assert y.tolist() == [-7.0, 0.5, 2.0**40, 1.0, 127.0, 9.0]


@pytest.mark.gpu
def test_wrong_arguments_are_refused_before_the_launch(kernels: Any) -> None:
    y = torch.zeros(6, device="cuda")
    with pytest.raises(TypeError, match="mixed: expected arguments of .* bytes"):
        kernels("mixed")(1, 32, [y, None])
    with pytest.raises(TypeError, match="add_one: expected arguments of"):
        kernels("add_one")(1, 32, [1])
    with pytest.raises(ValueError, match="argument 2: expected a value that fits"):
        kernels("mixed")(1, 32, [y, None, 2**31, 0.5, ctypes.c_int64(0), MAP, 9])
    assert y.count_nonzero() == 0


@pytest.mark.gpu
def test_more_than_48_kib_of_shared_memory(kernels: Any) -> None:
    y = torch.empty(50000, dtype=torch.int32, device="cuda")
    kernels("big_smem")(1, 256, [y], smem=200_000)
    assert torch.equal(y, torch.arange(49999, -1, -1, dtype=torch.int32, device="cuda"))


@pytest.mark.gpu
def test_too_much_shared_memory_names_the_kernel(kernels: Any) -> None:
    y = torch.empty(50000, dtype=torch.int32, device="cuda")
    with pytest.raises(driver.DriverError, match="big_smem: 300000 bytes of shared memory"):
        kernels("big_smem")(1, 256, [y], smem=300_000)


@pytest.mark.gpu
def test_empty_grid_launches_nothing(kernels: Any) -> None:
    y = torch.zeros(32, dtype=torch.int32, device="cuda")
    kernels("add_one")(0, 32, [y])
    kernels("add_one")((4, 0), 32, [y])
    assert y.count_nonzero() == 0


@pytest.mark.gpu
def test_streams_threads_and_graphs(kernels: Any) -> None:
    y = torch.zeros(32, dtype=torch.int32, device="cuda")
    kernel = kernels("add_one")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernel(1, 32, [y])
    stream.synchronize()
    thread = threading.Thread(target=kernel, args=(1, 32, [y]))
    thread.start()
    thread.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(1, 32, [y])
    graph.replay()
    graph.replay()
    assert y.tolist() == [4] * 32


@pytest.mark.gpu
def test_device_side_error_reaches_the_host_without_a_sync(kernels: Any) -> None:
    from fp8moe.kernels import status

    device = torch.device("cuda")
    status.check(device)
    kernels("report")(1, 1, [status.pointer(device)])
    with pytest.raises(ValueError, match=r"group_ends\[3\] = 10 after 20"):
        status.check_errors()
    status.check_errors()


@pytest.mark.gpu
@pytest.mark.slow
def test_launch_costs_little_host_time(kernels: Any) -> None:
    y = torch.zeros(6, device="cuda")
    kernel, args = kernels("mixed"), [y, None, -7, 0.5, ctypes.c_int64(1), MAP, 9]
    times_us = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            kernel(1, 32, args)
        times_us.append((time.perf_counter() - start) * 1e4)
    assert min(times_us) < 20.0, f"{min(times_us):.1f} us per launch"


@pytest.mark.gpu
def test_load_and_launch_in_a_thread_that_made_no_cuda_call(tmp_path: Path) -> None:
    path = tmp_path / "launch.cuh"
    path.write_text(KERNELS)
    cubin = jit.compile(jit.KernelSpec(str(path), "add_one")).cubin
    y = torch.zeros(32, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            launch.Kernel(cubin, "add_one")(1, 32, [y])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures
    assert y.tolist() == [1] * 32
