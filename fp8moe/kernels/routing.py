"""The routing map: which row of the expert order each (token, choice) slot goes to, and back."""

from __future__ import annotations

import functools

import torch

from fp8moe.kernels import jit, launch, reference, registry, status
from fp8moe.kernels.arguments import check_tensor
from fp8moe.kernels.fp8tensor import ceil_div, padded_capacity

MAX_EXPERTS = 1024
ID_DTYPES = (torch.int32, torch.int64)

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

WARPS = 8
SLOTS_PER_CTA = 2048
MAX_CTAS = 128


def _spec(entry: str, id_bits: int) -> jit.KernelSpec:
    return jit.KernelSpec("route.cuh", entry, (("ID_BITS", id_bits),))


@functools.cache
def _kernel(entry: str, id_bits: int) -> launch.Kernel:
    return jit.load(_spec(entry, id_bits))


def kernel_specs() -> list[jit.KernelSpec]:
    """Every kernel configuration that this module can launch."""
    return [_spec(entry, bits) for entry in ("route_count", "route_place") for bits in (32, 64)]


def slices(slots: int) -> tuple[int, int]:
    """(CTAs, slots of each of their warps) of the kernels that walk over slots in order."""
    wanted = min(MAX_CTAS, max(1, ceil_div(slots, SLOTS_PER_CTA)))
    slots_per_warp = max(1, ceil_div(slots, wanted * WARPS * 32)) * 32
    return max(1, ceil_div(slots, slots_per_warp * WARPS)), slots_per_warp


def _route_cuda(topk_ids: torch.Tensor, num_experts: int) -> Four:
    maps = _route_fake(topk_ids, num_experts)
    _launch(topk_ids, maps, None)
    return maps


def _route_kept_cuda(topk_ids: torch.Tensor, num_experts: int, kept: int) -> Five:
    maps = _empty_maps(topk_ids, num_experts, kept)
    kept_row = topk_ids.new_empty((kept,), dtype=torch.int32)
    _launch(topk_ids, maps, kept_row)
    return *maps, kept_row


def _launch(topk_ids: torch.Tensor, maps: Four, kept_row: torch.Tensor | None) -> None:
    row_of_slot, slot_of_row, group_ends, counts = maps
    slots, num_experts, device = topk_ids.numel(), len(counts), topk_ids.device
    ctas, slots_per_warp = slices(slots)
    partial = torch.empty(ctas * (num_experts + 1), dtype=torch.int32, device=device)
    first_bad = torch.empty(ctas, dtype=torch.int32, device=device)

    bits = 64 if topk_ids.dtype == torch.int64 else 32
    threads = WARPS * 32
    _kernel("route_count", bits)(
        ctas, threads, (topk_ids, slots, num_experts, slots_per_warp, partial, first_bad)
    )
    _kernel("route_place", bits)(
        ctas,
        threads,
        (
            topk_ids,
            slots,
            num_experts,
            slots_per_warp,
            partial,
            first_bad,
            len(slot_of_row),
            row_of_slot,
            slot_of_row,
            group_ends,
            counts,
            kept_row,
            status.pointer(device),
        ),
    )


def _route_fake(topk_ids: torch.Tensor, num_experts: int) -> Four:
    return _empty_maps(topk_ids, num_experts, topk_ids.numel())


def _route_kept_fake(topk_ids: torch.Tensor, num_experts: int, kept: int) -> Five:
    kept_row = topk_ids.new_empty((kept,), dtype=torch.int32)
    return *_empty_maps(topk_ids, num_experts, kept), kept_row


def _empty_maps(topk_ids: torch.Tensor, num_experts: int, kept: int) -> Four:
    return (
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty((padded_capacity(kept, num_experts),), dtype=torch.int32),
        topk_ids.new_empty((num_experts,), dtype=torch.int32),
        topk_ids.new_empty((num_experts,), dtype=torch.int32),
    )


_route = registry.define_op(
    "route(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.route,
    cuda=_route_cuda,
    fake=_route_fake,
)


_route_kept = registry.define_op(
    "route_kept(Tensor topk_ids, int num_experts, int kept)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.route_kept,
    cuda=_route_kept_cuda,
    fake=_route_kept_fake,
)


def _check(topk_ids: torch.Tensor, num_experts: int) -> None:
    check_tensor("topk_ids", topk_ids, ("T", "K"), ID_DTYPES)
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts: expected 1 to {MAX_EXPERTS}, got {num_experts}")
    slots = topk_ids.shape[0] * topk_ids.shape[1]
    if padded_capacity(slots, num_experts) >= 1 << 31:
        raise ValueError(f"topk_ids: expected fewer than 2**31 padded rows, got {slots} slots")


def route(topk_ids: torch.Tensor, num_experts: int) -> Four:
    """row_of_slot[t, k] = start[topk_ids[t, k]] + rank of slot t * K + k among its expert's slots.

    Deterministic: rows of an expert keep slot order. No host synchronisation.

    Args:
        topk_ids: (T, K) int32 or int64, contiguous, each in [0, num_experts]; num_experts itself
            drops the slot.
        num_experts: E, 1 to 1024.

    Returns:
        row_of_slot: (T, K) int32, the slot's row, or -1 if dropped.
        slot_of_row: (Rcap,) int32, the row's slot, -1 in a group's padding, -2 past the last group;
            Rcap = padded_capacity(T * K, E).
        group_ends: (E,) int32, cumulative ends, each a multiple of 128.
        counts: (E,) int32, rows of each expert without padding.

    Raises:
        ValueError: wrong shape, dtype or stride; an id out of range (on a GPU: the slot is dropped
            and the next operator or `fp8moe.check_errors` raises).
    """
    _check(topk_ids, num_experts)
    return _route(topk_ids, num_experts)


def route_kept(topk_ids: torch.Tensor, num_experts: int, kept: int) -> Five:
    """`route` for a known number of slots that are not dropped, and their rows one after the other.

    Args:
        topk_ids, num_experts: as for `route`.
        kept: how many slots are not dropped; on a GPU what does not fit is written past the end.

    Returns: row_of_slot, slot_of_row of Rcap = padded_capacity(kept, E), group_ends, counts, and
        kept_row: (kept,) int32, the rows of those slots, in slot order.

    Raises: as `route`; on a CPU also for another number of slots.
    """
    _check(topk_ids, num_experts)
    return _route_kept(topk_ids, num_experts, kept)
