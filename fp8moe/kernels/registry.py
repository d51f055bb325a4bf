"""Registration of the ``torch.ops.fp8moe`` operators and the choice of the backend they run on.

An operator is one schema with three implementations: ``cpu`` (plain PyTorch, runs on any device),
``cuda`` (launches our Hopper kernels) and ``fake`` (shapes only, for ``torch.compile``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Literal

import torch

from fp8moe.kernels import status

Backend = Literal["cuda", "reference"]

HOPPER = (9, 0)

_LIBRARY = torch.library.Library("fp8moe", "DEF")

# The kernels read strides (a per_token scale is MN-major), so a compiler must hand every operand
# over exactly as it is.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _gpu(index: int) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)


@functools.cache
def requested_backend() -> str:
    """The value of ``FP8MOE_BACKEND``: ``auto`` (default), ``cuda`` or ``reference``.

    Read once: a look at the environment takes a good part of a launch.

    Raises: ValueError for any other value.
    """
    choice = os.environ.get("FP8MOE_BACKEND") or "auto"
    if choice not in ("auto", "cuda", "reference"):
        raise ValueError(f"FP8MOE_BACKEND: expected auto, cuda or reference, got {choice!r}")
    return choice


def backend(device: torch.device) -> Backend:
    """The backend that runs operators on ``device``: ``"cuda"`` (our kernels) or ``"reference"``.

    A CPU runs the reference, a Hopper GPU (compute capability 9.0) our kernels, and
    ``FP8MOE_BACKEND=reference`` runs the reference on any device.

    Raises: RuntimeError for a GPU that cannot run the kernels, or when ``FP8MOE_BACKEND=cuda``
        meets a tensor that is not on a GPU; ValueError for an unknown ``FP8MOE_BACKEND``.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _backend(device)


@functools.cache
def _backend(device: torch.device) -> Backend:
    choice = requested_backend()
    if choice == "reference":
        return "reference"
    if device.type != "cuda":
        if choice == "cuda":
            raise RuntimeError(
                f"FP8MOE_BACKEND=cuda: expected tensors on a Hopper GPU, got device {device}"
            )
        return "reference"
    name, capability = _gpu(device.index)
    if capability != HOPPER:
        raise RuntimeError(
            f"fp8moe kernels: expected a Hopper GPU (compute capability 9.0: H100, H200, H20), "
            f"got {device} {name} (compute capability {capability[0]}.{capability[1]}). "
            f"Use a Hopper GPU, or set FP8MOE_BACKEND=reference to run the slow PyTorch "
            f"reference on this one."
        )
    return "cuda"


def _first_device(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device
    raise TypeError("an fp8moe operator was called without a tensor argument")


def _on_cpu(name: str, cpu: Callable[..., Any]) -> Callable[..., Any]:
    def entry(*args: Any) -> Any:
        backend(_first_device(args))
        return cpu(*args)

    entry.__name__ = f"{name}_cpu"
    return entry


def _on_cuda(name: str, cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Callable[..., Any]:
    def entry(*args: Any) -> Any:
        device = _first_device(args)
        if backend(device) == "reference":
            return cpu(*args)
        status.check(device)
        result = cuda(*args)
        if status.debug() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(device)
            status.check(device, op=name)
        return result

    entry.__name__ = f"{name}_cuda"
    return entry


def define_op(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """``torch.ops.fp8moe.<name>.default`` for ``schema``, with its three implementations.

    Args:
        schema: ``name(Tensor x, ...) -> ...``. An operator that writes into an argument marks it
            ``Tensor(a!) out`` and returns ``()``. Arguments are positional and have no defaults.
        cpu: plain PyTorch on any device; also the CUDA entry under ``FP8MOE_BACKEND=reference``.
        cuda: launches kernels on CUDA tensors. Input errors that an earlier kernel found on the
            device are raised before it is called.
        fake: returns empty tensors of the right shapes, strides and dtypes.

    Returns: a function of positional arguments; its attribute ``op`` is the operator itself. On a
        GPU, where nothing looks at operators (no compiler, mode, profiler or autograd), it calls
        ``cuda`` without torch's dispatcher, which takes as long as a launch.
    """
    name = schema.partition("(")[0].strip()
    _LIBRARY.define(schema, tags=_TAGS)
    on_cuda = _on_cuda(name, cpu, cuda)
    _LIBRARY.impl(name, _on_cpu(name, cpu), "CPU")
    _LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"fp8moe::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fp8moe, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _observed(args):
            return op(*args)
        return on_cuda(*args)

    call.op = op  # type: ignore[attr-defined]
    return call


@functools.cache
def _plain(kinds: tuple[type, ...]) -> bool:
    """Whether arguments of these types hold no tensor that overloads operators; a tensor first."""
    torchs = (torch.Tensor, torch.nn.Parameter)
    return kinds[0] in torchs and all(k in torchs or not issubclass(k, torch.Tensor) for k in kinds)


def _observed(args: tuple[Any, ...]) -> bool:
    """Whether a call must go through torch's dispatcher."""
    return (
        not _plain(tuple(map(type, args)))
        or not args[0].is_cuda
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or (torch.is_grad_enabled() and any([getattr(a, "requires_grad", False) for a in args]))
    )
