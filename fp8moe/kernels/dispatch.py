"""Which token goes to which rank of an expert-parallel group, and what travels beside its row.

Rank r of n holds the experts r * E/n to (r + 1) * E/n - 1. A token goes once to every rank that has
one of its experts. Rows, slots and what tells the ranks of each other come from two launches.
"""

from __future__ import annotations

import functools
import struct

import torch

from fp8moe.kernels import jit, launch, reference, registry
from fp8moe.kernels.arguments import check_tensor
from fp8moe.kernels.fp8tensor import BLOCK, ceil_div
from fp8moe.kernels.routing import ID_DTYPES, WARPS, slices

MAX_RANKS = 256
MAX_ALIKE = 8

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_THREADS = WARPS * 32


def _spec(entry: str, id_bits: int) -> jit.KernelSpec:
    return jit.KernelSpec("dispatch.cuh", entry, (("ID_BITS", id_bits),))


@functools.cache
def _kernel(entry: str, id_bits: int) -> launch.Kernel:
    return jit.load(_spec(entry, id_bits))


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    entries = ("dispatch_count", "dispatch_place", "dispatch_routing")
    return [_spec(entry, bits) for entry in entries for bits in (32, 64)]


def _id_bits(topk_ids: torch.Tensor) -> int:
    return 64 if topk_ids.dtype == torch.int64 else 32


def _maps_cuda(topk_ids: torch.Tensor, num_experts: int, ranks: int, alike: list[int]) -> Five:
    out = _maps_fake(topk_ids, num_experts, ranks, alike)
    slots, topk = topk_ids.numel(), topk_ids.shape[1]
    ctas, slots_per_warp = slices(slots)
    partial = topk_ids.new_empty((ctas, 2 * ranks + 1), dtype=torch.int32)
    bits = _id_bits(topk_ids)
    shape = (slots, slots_per_warp, max(1, topk), num_experts, num_experts // ranks)
    _kernel("dispatch_count", bits)(ctas, _THREADS, (topk_ids, *shape, partial))
    values = struct.pack(f"{MAX_ALIKE}i", *alike, *[0] * (MAX_ALIKE - len(alike)))
    _kernel("dispatch_place", bits)(
        ctas,
        _THREADS,
        (topk_ids, *shape, partial, len(out[3]), *out, values, len(alike)),
    )
    return out


def _maps_fake(topk_ids: torch.Tensor, num_experts: int, ranks: int, alike: list[int]) -> Five:
    tokens, topk = topk_ids.shape
    row, first_row, position = (
        topk_ids.new_empty((tokens, topk), dtype=torch.int32) for _ in range(3)
    )
    slot = topk_ids.new_empty(row_capacity(tokens, topk, ranks), dtype=torch.int32)
    sizes = topk_ids.new_empty((2, ranks, 3 + len(alike)), dtype=torch.int32)
    return row, first_row, position, slot, sizes


def row_capacity(tokens: int, topk: int, ranks: int) -> int:
    """The most rows that a batch can send, rounded up to whole blocks of 128."""
    return max(BLOCK, ceil_div(tokens * min(topk, ranks), BLOCK) * BLOCK)


def _routing_cuda(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_row_of_slot: torch.Tensor,
    experts_per_rank: int,
    out: torch.Tensor,
) -> None:
    slots, topk = topk_ids.numel(), topk_ids.shape[1]
    _kernel("dispatch_routing", _id_bits(topk_ids))(
        ceil_div(slots, _THREADS),
        _THREADS,
        (
            topk_ids,
            topk_weights,
            first_row_of_slot,
            slots,
            topk,
            experts_per_rank,
            out,
            out.stride(0),
        ),
    )


def _routing_fake(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_row_of_slot: torch.Tensor,
    experts_per_rank: int,
    out: torch.Tensor,
) -> None:
    pass


_maps = registry.define_op(
    "dispatch_maps(Tensor topk_ids, int num_experts, int ranks, int[] alike)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.dispatch_maps,
    cuda=_maps_cuda,
    fake=_maps_fake,
)
_routing = registry.define_op(
    "dispatch_routing(Tensor topk_ids, Tensor topk_weights, Tensor first_row_of_slot,"
    " int experts_per_rank, Tensor(a!) out) -> ()",
    cpu=reference.dispatch_routing,
    cuda=_routing_cuda,
    fake=_routing_fake,
)


def dispatch_maps(topk_ids: torch.Tensor, num_experts: int, ranks: int, alike: list[int]) -> Five:
    """Rows of the messages to the ranks, grouped by rank and in the order of tokens within one.

    Args:
        topk_ids: (T, K) int32 or int64, contiguous; num_experts drops the slot, and so does an id
            out of range, which is counted.
        num_experts: E, a multiple of ranks.
        ranks: 1 to 256.
        alike: up to 8 numbers for every line of sizes.

    Returns:
        row_of_slot: (T, K) int32, the row of the slot's token to the slot's rank, -1 if dropped.
        first_row_of_slot: the same, but -1 where an earlier slot of the token has that row.
        position_of_slot: (T, K) int32, the slot's place among all slots, -1 if dropped.
        slot_of_row: (Rcap,) int32, the slot that a row is the first of, -2 past the last row; with
            first_row_of_slot a routing map as `route` makes them, but without padding.
        sizes: (2, ranks, 3 + len(alike)) int32, [0, r] the rows and slots to rank r, wrong ids in
            all, and alike; [1] is not written.

    Raises: ValueError: wrong shape, dtype or stride, or a number out of range.
    """
    check_tensor("topk_ids", topk_ids, ("T", "K"), ID_DTYPES)
    if not 1 <= ranks <= MAX_RANKS or num_experts < 1 or num_experts % ranks:
        raise ValueError(
            f"num_experts, ranks: expected a multiple of 1 to {MAX_RANKS} ranks, "
            f"got {num_experts} and {ranks}"
        )
    if len(alike) > MAX_ALIKE:
        raise ValueError(f"alike: expected up to {MAX_ALIKE} numbers, got {len(alike)}")
    return _maps(topk_ids, num_experts, ranks, alike)


def dispatch_routing(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_row_of_slot: torch.Tensor,
    experts_per_rank: int,
    out: torch.Tensor,
) -> None:
    """out[row] = the token's weights, and its experts as numbered on the row's rank.

    Args:
        topk_ids: as for `dispatch_maps`, which made first_row_of_slot of it.
        topk_weights: (T, K) float32, contiguous.
        experts_per_rank: E / ranks, also the number of an expert that is elsewhere.
        out: (Rcap, 2K) int32, rows contiguous; the weights as their bits.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_tensor("topk_ids", topk_ids, ("T", "K"), ID_DTYPES)
    shape, device = tuple(topk_ids.shape), topk_ids.device
    check_tensor("topk_weights", topk_weights, shape, (torch.float32,), device)
    check_tensor("first_row_of_slot", first_row_of_slot, shape, (torch.int32,), device)
    if out.dtype != torch.int32 or out.shape[1:] != (2 * shape[1],) or out.stride(1) != 1:
        raise ValueError(
            f"out: expected int32 rows of {2 * shape[1]} neighbours, got {out.dtype} "
            f"{tuple(out.shape)} with strides {out.stride()}"
        )
    _routing(topk_ids, topk_weights, first_row_of_slot, experts_per_rank, out)
