"""Routing maps, and rows moved between token order and expert order."""

from __future__ import annotations

import torch

from fp8moe.kernels import status
from fp8moe.kernels.fp8tensor import (
    BLOCK,
    FLOOR_SCALE_POW2,
    FP8_DTYPE,
    empty_per_channel,
    padded_capacity,
)
from fp8moe.kernels.reference.cast import (
    as_bytes,
    cast_per_token,
    cast_rows_per_channel,
    encode,
    row_chunks,
    scales_of_rows,
)
from fp8moe.kernels.reference.dequantize import dequantize_per_token

PAD = -1
UNUSED = -2


def used_rows(slot_of_row: torch.Tensor) -> int:
    """Rows up to the padded end of the last group: a multiple of 128."""
    return int((slot_of_row != UNUSED).sum())


def route(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """row_of_slot[t, k] = start[topk_ids[t, k]] + rank of slot t * K + k among its expert's slots.

    Args:
        topk_ids: (T, K) int32 or int64, 0 to num_experts; num_experts drops the slot.

    Returns:
        row_of_slot: (T, K) int32, the slot's row, or -1 if dropped.
        slot_of_row: (Rcap,) int32, the row's slot, -1 in a group's padding, -2 past the last group.
        group_ends: (E,) int32, cumulative padded ends.
        counts: (E,) int32, rows of each expert without padding.

    Raises:
        ValueError: an id is below 0 or above num_experts.
    """
    t, k = topk_ids.shape
    device = topk_ids.device
    ids = topk_ids.reshape(-1).long()
    wrong = (ids < 0) | (ids > num_experts)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            status.message(status.Code.EXPERT_ID_OUT_OF_RANGE, i, int(ids[i]), num_experts)
        )
    order = torch.argsort(ids, stable=True)
    all_counts = torch.bincount(ids, minlength=num_experts + 1)
    counts = all_counts[:num_experts]
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    group_ends = padded.cumsum(0)
    starts = torch.cat([group_ends - padded, group_ends.new_zeros(1)])
    first = all_counts.cumsum(0) - all_counts

    expert = ids[order]
    row = starts[expert] + torch.arange(t * k, device=device) - first[expert]
    kept = expert < num_experts
    row_of_slot = torch.full((t * k,), -1, dtype=torch.int32, device=device)
    row_of_slot[order[kept]] = row[kept].int()

    capacity = padded_capacity(t * k, num_experts)
    used = group_ends[-1] if num_experts else group_ends.new_zeros(())
    unused = torch.arange(capacity, device=device) >= used
    slot_of_row = torch.where(unused, UNUSED, PAD).int()
    slot_of_row[row[kept]] = order[kept].int()
    return row_of_slot.view(t, k), slot_of_row, group_ends.int(), counts.int()


def route_kept(
    topk_ids: torch.Tensor, num_experts: int, kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route` with slot_of_row for `kept` slots, and the rows of these in slot order."""
    row_of_slot, slot_of_row, group_ends, counts = route(topk_ids, num_experts)
    kept_row = row_of_slot[row_of_slot >= 0]
    if len(kept_row) != kept:
        raise ValueError(f"topk_ids: expected {kept} slots that are kept, got {len(kept_row)}")
    capacity = padded_capacity(kept, num_experts)
    return row_of_slot, slot_of_row[:capacity], group_ends, counts, kept_row


def _take_rows(x: torch.Tensor, slot_of_row: torch.Tensor, topk: int) -> torch.Tensor:
    """out[r] = x[slot_of_row[r] // topk]; zero in padding, undefined past the last group."""
    out = x.new_empty((slot_of_row.numel(), x.shape[1]))
    used = used_rows(slot_of_row)
    if x.shape[0] == 0:
        out[:used] = 0
        return out
    slot = slot_of_row[:used]
    torch.index_select(x, 0, (slot // topk).clamp_min_(0), out=out[:used])
    out[:used][slot < 0] = 0
    return out


def permute_rows(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> torch.Tensor:
    """out[row_of_slot[t, k]] = x[t]; zero in padding, undefined past the last group."""
    return _take_rows(x, slot_of_row, row_of_slot.shape[1])


def permute_rows_into(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, out: torch.Tensor
) -> None:
    """out = permute_rows(x, ...), but for what lies past the last group."""
    used = used_rows(slot_of_row)
    out[:used] = permute_rows(x, row_of_slot, slot_of_row)[:used]


def _take_fp8_rows(
    data: torch.Tensor, scale: torch.Tensor, slot_of_row: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """data_out[r] = data[slot_of_row[r] // topk], scale likewise: bytes move, nothing is rounded.

    Padding has zero data and scale 2**-56, whatever the format of the other scales.
    """
    out = _take_rows(data.view(torch.uint8), slot_of_row, topk).view(FP8_DTYPE)
    used = used_rows(slot_of_row)
    slot = slot_of_row[:used]
    scale_t = torch.empty(
        (scale.shape[1], slot_of_row.numel()), dtype=torch.float32, device=scale.device
    )
    if data.shape[0]:
        scale_t[:, :used] = scale.t()[:, (slot // topk).clamp_min_(0)]
    scale_t[:, :used].masked_fill_(slot < 0, FLOOR_SCALE_POW2)
    return out, scale_t.t()


def permute_fp8(
    data: torch.Tensor, scale: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """data_out[row_of_slot[t, k]] = data[t], scale likewise; padding as in `permute_fp8_both`."""
    return _take_fp8_rows(data, scale, slot_of_row, row_of_slot.shape[1])


def _cast_rows_with_scales(
    rows: torch.Tensor, row_scale: torch.Tensor, capacity: int, pow2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """data_t[h, r] = e4m3(rows[r, h] / s[h // 128, r // 128]), s the largest row scale of a block.

    Args:
        rows: (R, H) FP32, of FP8 rows, R and H multiples of 128.
        row_scale: (R, H/128), 0 in padding.
        capacity: columns of data_t; those from R on stay undefined.
        pow2: round s up to a power of two.
    """
    r, h = rows.shape
    data_t, scale_t = empty_per_channel(h, capacity, rows.device, block=True)
    largest = row_scale.view(r // BLOCK, BLOCK, h // BLOCK).amax(1)
    scale, inv = scales_of_rows(largest, pow2)
    scale_t[:, : r // BLOCK] = scale.t()
    for at in row_chunks(r, h):
        blocks = slice(at.start // BLOCK, at.stop // BLOCK)
        v = rows[at].view(blocks.stop - blocks.start, BLOCK, h // BLOCK, BLOCK)
        bad = v.isnan() | scale[blocks, None, :, None].isnan()
        q = encode(v, inv[blocks, None, :, None], bad)
        as_bytes(data_t)[:, at] = as_bytes(q).view(at.stop - at.start, h).t()
    return data_t, scale_t


def permute_fp8_to_channel(
    data: torch.Tensor,
    scale: torch.Tensor,
    slot_of_row: torch.Tensor,
    topk: int,
    pow2: bool,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """data_t[h, r] = e4m3(data * scale of row slot_of_row[r] // topk / scale_t[h, r // 128]).

    With `block`, scale_t[h // 128, r // 128]: the largest of the rows' own scales.
    """
    used, capacity = used_rows(slot_of_row), slot_of_row.numel()
    rows = _take_rows(dequantize_per_token(data, scale), slot_of_row, topk)[:used]
    if block:
        row_scale = _take_rows(scale.contiguous(), slot_of_row, topk)[:used]
        return _cast_rows_with_scales(rows, row_scale, capacity, pow2)
    return cast_rows_per_channel(rows, capacity, pow2)


def permute_fp8_both(
    data: torch.Tensor, scale: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """permute_fp8 and permute_fp8_to_channel of the same input.

    Padding has zero data and scale 2**-56, whatever the format of the other scales.
    """
    return (
        *_take_fp8_rows(data, scale, slot_of_row, topk),
        *permute_fp8_to_channel(data, scale, slot_of_row, topk, pow2, False),
    )


def cast_permute(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """permute_fp8(cast_per_token(x))."""
    return permute_fp8(*cast_per_token(x, pow2), row_of_slot, slot_of_row)


def cast_permute_into(
    x: torch.Tensor,
    row_of_slot: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    data: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """data, scale = cast_permute(...), but for the padding and what lies past the last group."""
    rows, row_scale = cast_permute(x, row_of_slot, slot_of_row, pow2)
    real = (slot_of_row >= 0).nonzero().flatten()
    as_bytes(data)[real] = as_bytes(rows)[real]
    scale[real] = row_scale[real]


def cast_permute_to_channel(
    x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool, block: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """permute_fp8_to_channel(cast_per_token(x))."""
    return permute_fp8_to_channel(*cast_per_token(x, pow2), slot_of_row, topk, pow2, block)


def cast_permute_both(
    x: torch.Tensor, slot_of_row: torch.Tensor, topk: int, pow2: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """permute_fp8_both(cast_per_token(x))."""
    return permute_fp8_both(*cast_per_token(x, pow2), slot_of_row, topk, pow2)


def gather_sum(rows: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    """out[t] = sum_k rows[row_of_slot[t, k]], FP32 in the order of k, rounded once; -1 adds 0."""
    t, k = row_of_slot.shape
    total = torch.zeros((t, rows.shape[1]), dtype=torch.float32, device=rows.device)
    for j in range(k):
        row = row_of_slot[:, j]
        term = rows.index_select(0, row.clamp_min(0))
        dropped = row < 0
        if dropped.any():
            term[dropped] = 0
        total += term
    return total.to(rows.dtype)


def gather_slots(partials: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    """out[t, k] = sum_p partials[p, row_of_slot[t, k]], FP32 in the order of p; 0 where -1."""
    total = torch.zeros(row_of_slot.shape, dtype=torch.float32, device=partials.device)
    row = row_of_slot.clamp_min(0).long()
    for partial in partials:
        total += partial[row]
    return total.masked_fill_(row_of_slot < 0, 0.0)
