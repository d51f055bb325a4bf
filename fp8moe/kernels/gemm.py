"""The four FP8 GEMMs: argument checks, operators and launches of csrc/gemm.cuh.

All compute ``D[m, n] = sum_k A[m, k] B[n, k]`` with FP32 accumulation. A carries 1x128 scales
(``quant.per_token``; ``k_grouped_gemm``: ``quant.per_channel``), B 128x128 ones
(``quant.per_block``; ``k_grouped_gemm``: ``quant.per_channel`` with ``block=True``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

from fp8moe.kernels import heuristics, jit, launch, operands, reference, registry, status, tma
from fp8moe.kernels.fp8tensor import BLOCK, FP8Tensor
from fp8moe.kernels.heuristics import Grouping, Output, Problem, Tile

# ---------------------------------------------------------------------- launch


def spec(grouping: Grouping, output: Output, tile: Tile, groups: int) -> jit.KernelSpec:
    """The compiled configuration of ``tile``."""
    return jit.KernelSpec(
        "gemm.cuh",
        "gemm",
        (
            ("GROUPING", int(grouping)),
            ("OUTPUT", int(output)),
            *tile.constants,
            ("STAGES", tile.stages(groups)),
            ("ASYNC_STORE", int(tile.async_store)),
        ),
        hold_operands=True,
    )


def kernel_specs() -> list[jit.KernelSpec]:
    """Every configuration of the GEMM that ``heuristics`` lists."""
    specs = [
        spec(grouping, output, tile, groups)
        for grouping in Grouping
        for output in (list(Output) if grouping == Grouping.K_GROUPED else [Output.BF16])
        for tile in heuristics.candidates(grouping)
        for groups in (1, heuristics.MAX_GROUPS)
        if groups == 1 or grouping != Grouping.DENSE
    ]
    return list(dict.fromkeys(specs))


@lru_cache
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


_spared = 0


@contextlib.contextmanager
def sparing_sms(count: int) -> Iterator[None]:
    """This module's GEMMs leave `count` SMs free meanwhile, for a message that travels beside them.

    A GEMM's CTAs share its tiles evenly and stay until the last one. One that has to wait until
    another kernel leaves its SM ends that much later, and with it the GEMM: nothing is hidden.
    Split tiles, whose CTAs end after a part, take any SM.
    """
    global _spared
    before, _spared = _spared, count
    try:
        yield
    finally:
        _spared = before


def block_stride(scale: torch.Tensor) -> int:
    """Floats from one k-block of an MN-major scale to the next."""
    return scale.stride(-1) if scale.shape[-1] > 1 else 0


def operand_map(
    t: torch.Tensor, box_rows: int, row_order: tuple[tuple[int, int], ...] = ()
) -> tma.TensorMap:
    """Blocks of box_rows x 128 of an FP8 operand, all its groups as one matrix."""
    k = t.shape[-1]
    return tma.tensor_map(
        t.data_ptr(),
        dtype="u8",
        rows=t.numel() // k,
        cols=k,
        row_stride_bytes=k,
        box_rows=box_rows,
        box_cols=BLOCK,
        swizzle=128,
        row_order=row_order,
    )


# Launches by all that they depend on: in a training loop addresses come again, and to describe and
# pack the operands anew takes the host longer than the launch. None: seen once, and perhaps never
# again.
_prepared: dict[tuple[Any, ...], Callable[[], None] | None] = {}
_MAX_PREPARED = 4096


def _launch(
    p: Problem,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    groups: torch.Tensor | None,
    out: torch.Tensor,
    config: tuple[Tile, int] | None = None,
) -> None:
    """Run problem ``p``; ``config`` overrides the heuristic (tile, band) when searching."""
    if p.m == 0:
        return
    sms = max(1, num_sms(out.get_device()) - _spared)
    key = (
        p,
        config,
        sms,
        out.get_device(),
        a.data_ptr(),
        a_scale.data_ptr(),
        b.data_ptr(),
        b_scale.data_ptr(),
        out.data_ptr(),
        0 if groups is None else groups.data_ptr(),
        a_scale.stride(-1),
    )
    prepared = _prepared.get(key)
    if prepared is not None:
        return prepared()

    tile, band = config or heuristics.choose(p, sms)
    kernel, grid, threads, smem = _shape(p, tile, sms)
    map_a = operand_map(a, tile.block_m)
    # The epilogue's TMA stores; without them the kernel does not look at it.
    map_d = (
        tma.tensor_map(
            out.data_ptr(),
            dtype="bf16" if p.output == Output.BF16 else "f32",
            rows=p.rows_d,
            cols=p.n,
            row_stride_bytes=p.n * out.element_size(),
            box_rows=16,
            box_cols=128 // out.element_size(),
            swizzle=128,
        )
        if tile.async_store
        else map_a
    )
    args = [
        map_a,
        operand_map(b, tile.block_n),
        map_d,
        a_scale,
        b_scale,
        out,
        groups,
        status.pointer(out.device),
        p.m,
        p.n,
        p.k,
        p.groups,
        band,
        p.rows_a,
        block_stride(a_scale),
        b_scale.shape[-1],
    ]
    if key in _prepared:
        prepared = _prepared[key] = kernel.prepare(grid, threads, args, smem=smem)
        return prepared()
    if len(_prepared) >= _MAX_PREPARED:
        _prepared.clear()
    _prepared[key] = None
    kernel(grid, threads, args, smem=smem)


@lru_cache(maxsize=4096)
def _shape(p: Problem, tile: Tile, sms: int) -> tuple[launch.Kernel, int, int, int]:
    """The kernel of a problem, its grid, threads of a CTA and bytes of shared memory."""
    kernel = jit.load(spec(p.grouping, p.output, tile, p.groups))
    threads = 128 * (tile.consumers + 1)
    return kernel, heuristics.grid(p, tile, sms), threads, tile.shared_memory(p.groups)


def _gemm_nt_cuda(a, a_scale, b, b_scale, out) -> None:
    p = Problem(Grouping.DENSE, Output.BF16, a.shape[0], b.shape[0], a.shape[1])
    _launch(p, a, a_scale, b, b_scale, None, out)


def _m_grouped_cuda(a, a_scale, b, b_scale, group_ends, out) -> None:
    p = Problem(Grouping.M_GROUPED, Output.BF16, a.shape[0], b.shape[1], a.shape[1], b.shape[0])
    _launch(p, a, a_scale, b, b_scale, group_ends, out)


def _masked_cuda(a, a_scale, b, b_scale, group_sizes, out) -> None:
    p = Problem(Grouping.MASKED, Output.BF16, a.shape[1], b.shape[1], a.shape[2], b.shape[0])
    _launch(p, a, a_scale, b, b_scale, group_sizes, out)


def _k_grouped_cuda(a, a_scale, b, b_scale, group_ends, out, accumulate) -> None:
    output = Output.BF16 if out.dtype == torch.bfloat16 else Output.F32
    p = Problem(
        Grouping.K_GROUPED,
        Output.ADD if accumulate else output,
        a.shape[0],
        b.shape[0],
        a.shape[1],
        group_ends.shape[0],
    )
    _launch(p, a, a_scale, b, b_scale, group_ends, out)


def _no_result(*args) -> None:
    return None


_OPERANDS = "Tensor a, Tensor a_scale, Tensor b, Tensor b_scale"
_gemm_nt = registry.define_op(
    f"gemm_nt({_OPERANDS}, Tensor(a!) out) -> ()",
    cpu=reference.gemm_nt,
    cuda=_gemm_nt_cuda,
    fake=_no_result,
)
_m_grouped = registry.define_op(
    f"m_grouped_gemm_nt({_OPERANDS}, Tensor group_ends, Tensor(a!) out) -> ()",
    cpu=reference.m_grouped_gemm_nt,
    cuda=_m_grouped_cuda,
    fake=_no_result,
)
_masked = registry.define_op(
    f"m_grouped_gemm_nt_masked({_OPERANDS}, Tensor group_sizes, Tensor(a!) out) -> ()",
    cpu=reference.m_grouped_gemm_nt_masked,
    cuda=_masked_cuda,
    fake=_no_result,
)
_k_grouped = registry.define_op(
    f"k_grouped_gemm({_OPERANDS}, Tensor group_ends, Tensor(a!) out, bool accumulate) -> ()",
    cpu=reference.k_grouped_gemm,
    cuda=_k_grouped_cuda,
    fake=_no_result,
)


# ---------------------------------------------------------------------- public functions


def gemm_nt(a: FP8Tensor, b: FP8Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``D[m, n] = sum_k A[m, k] B[n, k]``

    Args:
        a: data (M, K) float8_e4m3fn, scale (M, ceil(K/128)) MN-major, from ``quant.per_token``.
        b: data (N, K), scale (ceil(N/128), ceil(K/128)), from ``quant.per_block``.
        out: optional (M, N) bfloat16 to write into.

    Returns: D, (M, N) bfloat16. M is arbitrary, N a multiple of 8, K of 16. With few rows K may be
        summed in parts, so the last bits of a row depend on M and on the GPU's number of SMs.

    Raises: ValueError naming the argument, what was expected and what came.

    Source: two-level accumulation as in section 3.3.2 of the DeepSeek-V3 report.
    """
    operands.check_gemm_nt(*operands.parts(a, b), out)
    operands.check_addresses(a, b, out)
    if out is None:
        out = a.data.new_empty((a.data.shape[0], b.data.shape[0]), dtype=torch.bfloat16)
    _gemm_nt(a.data, a.scale, b.data, b.scale, out)
    return out


def m_grouped_gemm_nt(
    a: FP8Tensor, b: FP8Tensor, group_ends: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``D[m, n] = sum_k A[m, k] B[g(m), n, k]``, rows ``group_ends[g-1] <= m < group_ends[g]``

    Args:
        a: data (M, K) float8_e4m3fn, scale (M, ceil(K/128)) MN-major, from ``quant.per_token``.
        b: data (E, N, K), scale (E, ceil(N/128), ceil(K/128)), from ``quant.per_block``.
        group_ends: (E,) int32 on the device, non-decreasing, at most M. Groups of any size.
        out: optional (M, N) bfloat16 to write into.

    Returns: D, (M, N) bfloat16. Rows from ``group_ends[-1]`` on are not written.

    Raises: ValueError naming the argument, what was expected and what came. Bad ``group_ends`` are
        found on the device and raised by a later operator or ``fp8moe.check_errors``.

    Source: the grouped layout of DeepGEMM, with arbitrary group ends.
    """
    operands.check_m_grouped(*operands.parts(a, b), group_ends, out)
    operands.check_addresses(a, b, out)
    if out is None:
        out = a.data.new_empty((a.data.shape[0], b.data.shape[1]), dtype=torch.bfloat16)
    _m_grouped(a.data, a.scale, b.data, b.scale, group_ends, out)
    return out


def m_grouped_gemm_nt_masked(
    a: FP8Tensor, b: FP8Tensor, group_sizes: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``D[g, m, n] = sum_k A[g, m, k] B[g, n, k]`` for ``m < group_sizes[g]``

    Args:
        a: data (E, M, K) float8_e4m3fn, scale (E, M, ceil(K/128)) with strides (M, 1, >= E * M):
            ``quant.per_token`` of the (E * M, K) view, both parts unflattened.
        b: data (E, N, K), scale (E, ceil(N/128), ceil(K/128)), from ``quant.per_block``.
        group_sizes: (E,) int32 on the device, 0 to M each.
        out: optional (E, M, N) bfloat16 to write into.

    Returns: D, (E, M, N) bfloat16. Rows past a group's size are not written.

    Raises: ValueError naming the argument, what was expected and what came. Bad ``group_sizes``
        are found on the device and raised by a later operator or ``fp8moe.check_errors``.

    Source: the masked layout of DeepGEMM.
    """
    operands.check_masked(*operands.parts(a, b), group_sizes, out)
    operands.check_addresses(a, b, out)
    if out is None:
        out = a.data.new_empty((*a.data.shape[:2], b.data.shape[1]), dtype=torch.bfloat16)
    _masked(a.data, a.scale, b.data, b.scale, group_sizes, out)
    return out


def k_grouped_gemm(
    a_t: FP8Tensor,
    b_t: FP8Tensor,
    group_ends: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """``D[g, n, k] (+)= sum over rows r of group g of A[n, r] B[k, r]``: the weight gradient

    Args:
        a_t: data (N, R') float8_e4m3fn, scale (N, R'/128) MN-major, from ``quant.per_channel``:
            each group starts at a multiple of 128 and is padded with zeros.
        b_t: data (K, R'), scale (ceil(K/128), R'/128) contiguous, from ``quant.per_channel`` with
            ``block=True``: the same padding, a scale for 128 channels and rows.
        group_ends: (E,) int32 on the device: the ends before padding, as given to the cast.
        out: optional (E, N, K), float32 or bfloat16, to write into.
        accumulate: add to ``out``, which must then be float32.

    Returns: D, (E, N, K), bfloat16 unless ``out`` says otherwise. An empty group gives zeros, or
        leaves its part of ``out`` alone when accumulating.

    Raises: ValueError naming the argument, what was expected and what came. Bad ``group_ends`` are
        found on the device and raised by a later operator or ``fp8moe.check_errors``.

    Source: the K-grouped layout of DeepGEMM, but one padded concatenation of all groups.
    """
    operands.check_k_grouped(
        *operands.parts(a_t, b_t, "_t"), group_ends, out, accumulate=accumulate
    )
    operands.check_addresses(a_t, b_t, out, "_t")
    if out is None:
        shape = (group_ends.shape[0], a_t.data.shape[0], b_t.data.shape[0])
        out = a_t.data.new_empty(shape, dtype=torch.bfloat16)
    _k_grouped(a_t.data, a_t.scale, b_t.data, b_t.scale, group_ends, out, accumulate)
    return out
