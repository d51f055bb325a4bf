"""The way back from expert order: sums over the rows of a token, and values of its slots."""

from __future__ import annotations

import functools

import torch

from fp8moe.kernels import jit, launch, reference, registry
from fp8moe.kernels.arguments import check_aligned, check_multiple, check_tensor
from fp8moe.kernels.fp8tensor import ceil_div

SUM_WARPS = 4
SUM_ROWS = (1, 2, 4, 8)
"""Rows of a token that a lane loads at once; fewer rows come with more columns."""

SLOTS_THREADS = 256


def _gather_sum_spec(rows: int) -> jit.KernelSpec:
    return jit.KernelSpec("gather.cuh", "gather_sum", (("ROWS", rows),))


def _gather_slots_spec() -> jit.KernelSpec:
    return jit.KernelSpec("gather.cuh", "gather_slots", (("ROWS", 1),))


@functools.cache
def _gather_sum_kernel(rows: int) -> launch.Kernel:
    return jit.load(_gather_sum_spec(rows))


@functools.cache
def _gather_slots_kernel() -> launch.Kernel:
    return jit.load(_gather_slots_spec())


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    return [*(_gather_sum_spec(rows) for rows in SUM_ROWS), _gather_slots_spec()]


def _gather_sum_cuda(rows: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    out = _gather_sum_fake(rows, row_of_slot)
    tokens, columns = out.shape
    if tokens == 0 or columns == 0:
        return out
    check_aligned(rows=rows)
    topk = row_of_slot.shape[1]
    batch = next((r for r in SUM_ROWS if r >= topk), SUM_ROWS[-1])
    # Each warp sums one token over a run of 16-byte column chunks.
    chunks_per_warp = 32 * min(4, SUM_ROWS[-1] // batch)
    runs = ceil_div(columns // 8, chunks_per_warp)
    _gather_sum_kernel(batch)(
        (ceil_div(tokens, SUM_WARPS), runs),
        SUM_WARPS * 32,
        (rows, row_of_slot, tokens, topk, columns, out),
    )
    return out


def _gather_sum_fake(rows: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((row_of_slot.shape[0], rows.shape[1]))


def _gather_slots_cuda(partials: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    out = _gather_slots_fake(partials, row_of_slot)
    slots = out.numel()
    if slots == 0:
        return out
    count, capacity = partials.shape
    _gather_slots_kernel()(
        ceil_div(slots, SLOTS_THREADS),
        SLOTS_THREADS,
        (partials, row_of_slot, slots, count, capacity, out),
    )
    return out


def _gather_slots_fake(partials: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    return partials.new_empty(row_of_slot.shape)


_gather_sum = registry.define_op(
    "gather_sum(Tensor rows, Tensor row_of_slot) -> Tensor",
    cpu=reference.gather_sum,
    cuda=_gather_sum_cuda,
    fake=_gather_sum_fake,
)
_gather_slots = registry.define_op(
    "gather_slots(Tensor partials, Tensor row_of_slot) -> Tensor",
    cpu=reference.gather_slots,
    cuda=_gather_slots_cuda,
    fake=_gather_slots_fake,
)


def gather_sum(rows: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    """out[t] = sum_k rows[row_of_slot[t, k]], FP32 in the order of k, then rounded; -1 adds 0.

    Args:
        rows: (Rcap, H) bfloat16, contiguous, H a multiple of 8.
        row_of_slot: (T, K) int32 from `route`.

    Returns: (T, H) bfloat16.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_tensor("rows", rows, ("Rcap", "H"), (torch.bfloat16,))
    check_multiple("rows: H", rows.shape[1], 8)
    check_tensor("row_of_slot", row_of_slot, ("T", "K"), (torch.int32,), rows.device)
    return _gather_sum(rows, row_of_slot)


def gather_slots(partials: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    """out[t, k] = sum_p partials[p, row_of_slot[t, k]], FP32 in the order of p; 0 where -1.

    Args:
        partials: (P, Rcap) float32, contiguous.
        row_of_slot: (T, K) int32 from `route`.

    Returns: (T, K) float32.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_tensor("partials", partials, ("P", "Rcap"), (torch.float32,))
    check_tensor("row_of_slot", row_of_slot, ("T", "K"), (torch.int32,), partials.device)
    return _gather_slots(partials, row_of_slot)
