"""Casts to FP8 (E4M3) with per_token, per_block or per_channel scales, and the byte transpose."""

from __future__ import annotations

import functools

import torch

from fp8moe.kernels import jit, launch, reference, registry, status
from fp8moe.kernels.arguments import check_tensor
from fp8moe.kernels.fp8tensor import (
    BLOCK,
    FP8_DTYPE,
    ceil_div,
    empty_per_channel,
    empty_scale,
    padded_capacity,
    scale_ld,
)

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]

INPUTS = {torch.bfloat16: "Bf16", torch.float16: "F16", torch.float32: "F32"}
"""The dtypes that can be cast, and their names in the kernels."""

_ENTRIES = ("cast_per_token", "cast_per_block", "cast_per_block_both")
_THREADS = 256


def _constants(dtype: torch.dtype, pow2: bool, aligned: bool) -> tuple[tuple[str, int | str], ...]:
    return ("INPUT", INPUTS[dtype]), ("POW2", int(pow2)), ("ALIGNED", int(aligned))


def _spec(entry: str, dtype: torch.dtype, pow2: bool, aligned: bool) -> jit.KernelSpec:
    return jit.KernelSpec("cast.cuh", entry, _constants(dtype, pow2, aligned))


def _channel_spec(dtype: torch.dtype, pow2: bool, aligned: bool, block: bool) -> jit.KernelSpec:
    constants = (*_constants(dtype, pow2, aligned), ("BLOCK", int(block)))
    return jit.KernelSpec("cast_per_channel.cuh", "cast_per_channel", constants)


def _transpose_spec(aligned: bool) -> jit.KernelSpec:
    # Bytes have no input format and no scale of their own: any build of the file will do.
    constants = (("INPUT", "Bf16"), ("POW2", 1), ("ALIGNED", int(aligned)))
    return jit.KernelSpec("cast.cuh", "transpose_per_block", constants)


@functools.cache
def _kernel(entry: str, dtype: torch.dtype, pow2: bool, aligned: bool) -> launch.Kernel:
    return jit.load(_spec(entry, dtype, pow2, aligned))


@functools.cache
def _channel_kernel(dtype: torch.dtype, pow2: bool, aligned: bool, block: bool) -> launch.Kernel:
    return jit.load(_channel_spec(dtype, pow2, aligned, block))


@functools.cache
def _transpose_kernel(aligned: bool) -> launch.Kernel:
    return jit.load(_transpose_spec(aligned))


def kernel_specs() -> list[jit.KernelSpec]:
    """Every configuration of the cast kernels that the package can launch."""
    # Entries outermost: neighbours in the list then differ in source, and a parallel warm-up does
    # not compile one source twice at the same time.
    specs = [
        _spec(entry, dtype, pow2, aligned)
        for entry in _ENTRIES
        for dtype in INPUTS
        for pow2 in (True, False)
        for aligned in (True, False)
    ]
    specs += [
        _channel_spec(dtype, pow2, aligned, block)
        for dtype in INPUTS
        for pow2 in (True, False)
        for aligned in (True, False)
        for block in (True, False)
    ]
    return [*specs, _transpose_spec(True), _transpose_spec(False)]


# Outputs, shared by the CUDA and the fake implementations.


def _per_token_outputs(x: Tensor) -> Pair:
    m, k = x.shape
    data = torch.empty((m, k), dtype=FP8_DTYPE, device=x.device)
    return data, empty_scale(m, ceil_div(k, BLOCK), x.device)


def _per_block_outputs(e: int, n: int, k: int, device: torch.device) -> Pair:
    data = torch.empty((e, n, k), dtype=FP8_DTYPE, device=device)
    shape = (e, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    return data, torch.empty(shape, dtype=torch.float32, device=device)


def _per_channel_outputs(x: Tensor, group_ends: Tensor, block: bool) -> Pair:
    r, n = x.shape
    return empty_per_channel(n, padded_capacity(r, group_ends.shape[0]), x.device, block)


def _aligned(t: Tensor, elements: int) -> bool:
    """Whether every row of `t` is a whole number of vectors of `elements` and starts on one."""
    return t.shape[-1] % elements == 0 and t.data_ptr() % 16 == 0


# CUDA implementations, for contiguous inputs.


def _cast_per_token_cuda(x: Tensor, pow2: bool) -> Pair:
    data, scale = _per_token_outputs(x)
    m, k = x.shape
    if x.numel():
        grid = ceil_div(m, 64) * ceil_div(k, 256)
        kernel = _kernel("cast_per_token", x.dtype, pow2, _aligned(x, 8))
        kernel(grid, _THREADS, (x, data, scale, m, k, scale_ld(m)))
    return data, scale


def _cast_per_block_cuda(w: Tensor, pow2: bool) -> Pair:
    e, n, k = w.shape
    data, scale = _per_block_outputs(e, n, k, w.device)
    if w.numel():
        kernel = _kernel("cast_per_block", w.dtype, pow2, _aligned(w, 8))
        kernel(scale.numel(), _THREADS, (w, data, scale, n, k))
    return data, scale


def _cast_per_block_both_cuda(w: Tensor, pow2: bool) -> Four:
    e, n, k = w.shape
    data, scale = _per_block_outputs(e, n, k, w.device)
    data_t, scale_t = _per_block_outputs(e, k, n, w.device)
    if w.numel():
        aligned = _aligned(w, 8) and _aligned(data_t, 16)
        kernel = _kernel("cast_per_block_both", w.dtype, pow2, aligned)
        kernel(scale.numel(), _THREADS, (w, data, scale, data_t, scale_t, n, k))
    return data, scale, data_t, scale_t


def _transpose_per_block_cuda(data: Tensor, scale: Tensor) -> Pair:
    e, n, k = data.shape
    data_t, scale_t = _per_block_outputs(e, k, n, data.device)
    if data.numel():
        grid = e * ceil_div(n, BLOCK) * ceil_div(k, 2 * BLOCK)
        kernel = _transpose_kernel(_aligned(data, 16) and _aligned(data_t, 16))
        kernel(grid, _THREADS, (data, scale, data_t, scale_t, n, k))
    return data_t, scale_t


def _cast_per_channel_cuda(x: Tensor, group_ends: Tensor, pow2: bool, block: bool) -> Pair:
    data, scale = _per_channel_outputs(x, group_ends, block)
    (r, n), e = x.shape, group_ends.shape[0]
    if n:
        capacity = data.shape[1]
        grid = capacity // BLOCK * ceil_div(n, BLOCK)
        errors = status.pointer(x.device)
        sizes = (r, n, e, capacity, capacity // BLOCK if block else scale_ld(n))
        kernel = _channel_kernel(x.dtype, pow2, _aligned(x, 8), block)
        kernel(grid, _THREADS, (x, group_ends, data, scale, errors, *sizes))
    return data, scale


# Shapes only.


def _cast_per_token_fake(x: Tensor, pow2: bool) -> Pair:
    return _per_token_outputs(x)


def _cast_per_block_fake(w: Tensor, pow2: bool) -> Pair:
    e, n, k = w.shape
    return _per_block_outputs(e, n, k, w.device)


def _cast_per_block_both_fake(w: Tensor, pow2: bool) -> Four:
    e, n, k = w.shape
    return *_per_block_outputs(e, n, k, w.device), *_per_block_outputs(e, k, n, w.device)


def _transpose_per_block_fake(data: Tensor, scale: Tensor) -> Pair:
    e, n, k = data.shape
    return _per_block_outputs(e, k, n, data.device)


def _cast_per_channel_fake(x: Tensor, group_ends: Tensor, pow2: bool, block: bool) -> Pair:
    return _per_channel_outputs(x, group_ends, block)


_cast_per_token_op = registry.define_op(
    "cast_per_token(Tensor x, bool pow2) -> (Tensor, Tensor)",
    cpu=reference.cast_per_token,
    cuda=_cast_per_token_cuda,
    fake=_cast_per_token_fake,
)
_cast_per_block_op = registry.define_op(
    "cast_per_block(Tensor w, bool pow2) -> (Tensor, Tensor)",
    cpu=reference.cast_per_block,
    cuda=_cast_per_block_cuda,
    fake=_cast_per_block_fake,
)
_cast_per_block_both_op = registry.define_op(
    "cast_per_block_both(Tensor w, bool pow2) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.cast_per_block_both,
    cuda=_cast_per_block_both_cuda,
    fake=_cast_per_block_both_fake,
)
_transpose_per_block_op = registry.define_op(
    "transpose_per_block(Tensor data, Tensor scale) -> (Tensor, Tensor)",
    cpu=reference.transpose_per_block,
    cuda=_transpose_per_block_cuda,
    fake=_transpose_per_block_fake,
)
_cast_per_channel_op = registry.define_op(
    "cast_per_channel(Tensor x, Tensor group_ends, bool pow2, bool block) -> (Tensor, Tensor)",
    cpu=reference.cast_per_channel,
    cuda=_cast_per_channel_cuda,
    fake=_cast_per_channel_fake,
)


def _check_input(name: str, x: Tensor, dims: tuple[str, ...]) -> None:
    check_tensor(name, x, dims, tuple(INPUTS), contiguous=False)


def cast_per_token(x: Tensor, pow2: bool) -> Pair:
    """data[m, k] = e4m3(x[m, k] / scale[m, k // 128]).

    scale = max |x| of the block / 448, or that rounded up to a power of two.

    Args:
        x: (M, K), bfloat16, float16 or float32, any strides (copied if not contiguous).
        pow2: round scales up to powers of two.

    Returns:
        data: (M, K) float8_e4m3fn, contiguous.
        scale: (M, ceil(K/128)) float32, MN-major: strides (1, ceil(M/4)*4). A block with a NaN or
            Inf has scale NaN and data NaN; an all-zero block has the smallest scale and zero data.

    Raises: ValueError for another dtype or number of dimensions.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    _check_input("x", x, ("M", "K"))
    return _cast_per_token_op(x.contiguous(), pow2)


def cast_per_block(w: Tensor, pow2: bool) -> Pair:
    """data[e, n, k] = e4m3(w[e, n, k] / scale[e, n // 128, k // 128]).

    Args:
        w: (E, N, K), bfloat16, float16 or float32, any strides (copied if not contiguous).
        pow2: round scales up to powers of two.

    Returns:
        data: (E, N, K) float8_e4m3fn, contiguous.
        scale: (E, ceil(N/128), ceil(K/128)) float32, contiguous; NaN, Inf and zeros as in
            `cast_per_token`.

    Raises: ValueError for another dtype or number of dimensions.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    _check_input("w", w, ("E", "N", "K"))
    return _cast_per_block_op(w.contiguous(), pow2)


def cast_per_block_both(w: Tensor, pow2: bool) -> Four:
    """data, scale = cast_per_block(w); data_t[e, k, n] = data[e, n, k], scale_t likewise.

    Reads w once. A 128 x 128 scale transposes with its block, so both copies hold the same values.

    Args:
        w: (E, N, K), bfloat16, float16 or float32, any strides (copied if not contiguous).
        pow2: round scales up to powers of two.

    Returns:
        data (E, N, K), scale (E, ceil(N/128), ceil(K/128)), data_t (E, K, N),
        scale_t (E, ceil(K/128), ceil(N/128)); all contiguous.

    Raises: ValueError for another dtype or number of dimensions.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    _check_input("w", w, ("E", "N", "K"))
    return _cast_per_block_both_op(w.contiguous(), pow2)


def transpose_per_block(data: Tensor, scale: Tensor) -> Pair:
    """data_t[e, k, n] = data[e, n, k], scale_t[e, kb, nb] = scale[e, nb, kb]: exact.

    Args:
        data: (E, N, K) float8_e4m3fn.
        scale: (E, ceil(N/128), ceil(K/128)) float32.

    Returns:
        data_t: (E, K, N) float8_e4m3fn, contiguous.
        scale_t: (E, ceil(K/128), ceil(N/128)) float32, contiguous.

    Raises: ValueError when dtypes, shapes or devices do not match.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    check_tensor("data", data, ("E", "N", "K"), (FP8_DTYPE,), contiguous=False)
    e, n, k = data.shape
    blocks = (e, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    check_tensor("scale", scale, blocks, (torch.float32,), data.device, contiguous=False)
    return _transpose_per_block_op(data.contiguous(), scale.contiguous())


def cast_per_channel(x: Tensor, group_ends: Tensor, pow2: bool, block: bool) -> Pair:
    """data[n, start_g + i] = e4m3(x[row_g + i, n] / scale[n, (start_g + i) // 128]), transposed.

    Group g holds rows [group_ends[g-1], group_ends[g]) of x, from row_g on. In the output it starts
    at start_g, the sum of the earlier groups' sizes, each rounded up to a multiple of 128, and is
    padded to such a multiple with zeros. Rows past group_ends[-1] are ignored.

    Args:
        x: (R, N), bfloat16, float16 or float32, any strides (copied if not contiguous).
        group_ends: (E,) int32 on the device of x, cumulative; groups may be empty. Read on the
            device: an end that decreases or exceeds R is raised by a later operator (on a CPU, at
            once).
        pow2: round scales up to powers of two.
        block: one scale for 128 rows x 128 channels instead of 128 rows of one channel.

    Returns:
        data: (N, C) float8_e4m3fn, contiguous, C = max(128, floor((R + 127 E) / 128) * 128).
            Columns past the last group's padded end are undefined.
        scale: (N, C/128) float32, MN-major: strides (1, ceil(N/4)*4); or with `block`
            (ceil(N/128), C/128), contiguous, for scale[n // 128, c // 128]: per_block, of the
            transposed matrix. NaN, Inf and zeros as in `cast_per_token`.

    Raises: ValueError when dtypes, dimensions or devices do not match.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2 (128 x 1 blocks).
    """
    _check_input("x", x, ("R", "N"))
    check_tensor("group_ends", group_ends, ("E",), (torch.int32,), x.device, contiguous=False)
    return _cast_per_channel_op(x.contiguous(), group_ends.contiguous(), pow2, block)
