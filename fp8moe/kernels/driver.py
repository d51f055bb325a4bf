"""The CUDA driver through cuda.bindings: initialised once, its errors as exceptions."""

from __future__ import annotations

import functools
from typing import Any


class DriverError(RuntimeError):
    """A CUDA driver call failed."""


@functools.cache
def driver() -> Any:
    """The bindings of the CUDA driver, initialised.

    Raises: DriverError when there is no driver, or it finds no GPU, saying which.
    """
    # Every other driver call is made only after this probe: without a driver, cuInit raises cleanly
    # where others may break and leave the bindings deadlocked.
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        raise DriverError(
            f"CUDA driver: expected the package cuda-python>=13, got {error}"
        ) from error
    try:
        (result,) = bindings.cuInit(0)
    except RuntimeError as error:
        raise DriverError(
            "CUDA driver: expected an NVIDIA driver on this machine, found no libcuda"
        ) from error
    if result != bindings.CUresult.CUDA_SUCCESS:
        raise DriverError(f"CUDA driver: cuInit failed with {result.name}")
    return bindings


def driver_version() -> str:
    """The CUDA version the driver supports, e.g. ``13.0``.

    Raises: DriverError when there is no driver.
    """
    (version,) = checked(driver().cuDriverGetVersion(), "cuDriverGetVersion")
    return f"{version // 1000}.{version % 1000 // 10}"


def checked(result: tuple, call: str) -> tuple:
    """What a driver call returned after its code. Raises: DriverError naming the call."""
    code = result[0]
    if code.value != 0:
        _, text = driver().cuGetErrorString(code)
        raise DriverError(f"{call}: {code.name} ({text.decode() if text else 'no description'})")
    return result[1:]


def lacked_context(code: Any, device: int) -> bool:
    """Whether a call failed because this thread had no current context; now it has: repeat it.

    Threads have none until their first call of the CUDA runtime, and the thread of the backward
    pass may come here before that. The primary context is the one that the runtime uses.
    torch.cuda.set_device is no substitute: versions of it do nothing for the same index.
    """
    cu = driver()
    if code.value != cu.CUresult.CUDA_ERROR_INVALID_CONTEXT.value:
        return False
    (handle,) = checked(cu.cuDeviceGet(device), "cuDeviceGet")
    (context,) = checked(cu.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")
    checked(cu.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return True
