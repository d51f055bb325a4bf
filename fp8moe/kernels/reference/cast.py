"""FP8 casts: block maximum, scale, clamp, round to nearest even; bit-exact with the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fp8moe.kernels.fp8tensor import (
    AMAX_FLOOR,
    BLOCK,
    FP8_DTYPE,
    FP8_MAX,
    FP8_NAN_BYTE,
    ceil_div,
    empty_per_channel,
    empty_scale,
    padded_capacity,
)
from fp8moe.kernels.reference import groups

CHUNK_ELEMENTS = 1 << 19


def as_bytes(data: torch.Tensor) -> torch.Tensor:
    """The bytes of FP8 data: torch copies and indexes uint8 faster, and everywhere."""
    return data.view(torch.uint8)


def scales_of(amax: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = amax / 448 (or that rounded up to a power of two) and its multiplier, FP32.

    A non-finite amax gives scale NaN and multiplier 0 (the caller marks the block's data).
    Division is tensor by tensor: torch turns a division by, or of, a Python scalar into a product
    with a reciprocal on some devices, which is not IEEE division.
    """
    bad = ~torch.isfinite(amax)
    amax = amax.masked_fill(bad, 1.0).clamp_min_(AMAX_FLOOR)
    top = torch.full_like(amax, FP8_MAX)
    scale = amax / top
    if pow2:
        exponent = ((scale.view(torch.int32) - 1) >> 23) + 1
        scale = (exponent << 23).view(torch.float32)
        inv = ((254 - exponent) << 23).view(torch.float32)
    else:
        inv = top / amax
    return scale.masked_fill_(bad, float("nan")), inv.masked_fill_(bad, 0.0)


def scales_of_rows(largest: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and multiplier of FP8 blocks whose largest row scale is `largest`.

    Those of a block with the maximum 448 * largest, capped where that would overflow. FP32 scales,
    which rounding may have moved by one unit in the last place, are kept as they are.
    """
    amax = torch.where(
        torch.isfinite(largest),
        (largest * FP8_MAX).clamp_max(torch.finfo(torch.float32).max),
        largest,
    )
    scale, inv = scales_of(amax, pow2)
    if not pow2:
        scale = torch.where(torch.isfinite(amax) & (amax >= AMAX_FLOOR), largest, scale)
    return scale, inv


def quantize_blocks(
    x: torch.Tensor, dims: tuple[int, ...], pow2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """data = e4m3(clamp(x * inv, +-448)) with one scale for all of `dims`.

    Args:
        x: any float dtype, already split into blocks.
        dims: the dimensions inside a block.

    Returns:
        data, float8_e4m3fn, the shape of x; scale, float32, the shape of x without `dims`.
    """
    x = x.float()
    scale, inv = scales_of(x.abs().amax(dim=dims, keepdim=True), pow2)
    return encode(x, inv, torch.isnan(scale)), scale.squeeze(dims)


def encode(x: torch.Tensor, inv: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """e4m3(clamp(x * inv, +-448)), and NaN where `bad`; x float32, the others broadcast."""
    data = (x * inv).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    if bad.any():
        as_bytes(data).masked_fill_(bad, FP8_NAN_BYTE)
    return data


def pad_to_blocks(x: torch.Tensor, *dims: int) -> torch.Tensor:
    """x with each of `dims` zero-padded to a multiple of 128; x itself if nothing is missing."""
    pad = [0] * (2 * x.ndim)
    for d in dims:
        pad[2 * (x.ndim - 1 - d % x.ndim) + 1] = -x.shape[d] % BLOCK
    return F.pad(x, pad) if any(pad) else x


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Slices of whole 128-row blocks that keep a chunk's FP32 temporaries inside the CPU's cache.

    It matters: an operation on fresh memory outside the cache costs several times one inside it.
    """
    step = max(1, CHUNK_ELEMENTS // (BLOCK * max(1, columns))) * BLOCK
    return [slice(lo, min(lo + step, rows)) for lo in range(0, rows, step)]


def empty_per_token(
    m: int, k: int, device: torch.device | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised data (m, k) and per_token scale."""
    data = torch.empty((m, k), dtype=FP8_DTYPE, device=device)
    return data, empty_scale(m, ceil_div(k, BLOCK), device)


def write_per_token(
    rows: torch.Tensor, pow2: bool, out: tuple[torch.Tensor, torch.Tensor], at: slice
) -> None:
    """Casts `rows` per token into the rows `at` of `out`."""
    m, k = rows.shape
    data, scale = out
    blocks = pad_to_blocks(rows, 1).view(m, ceil_div(k, BLOCK), BLOCK)
    q, s = quantize_blocks(blocks, (2,), pow2)
    as_bytes(data)[at] = as_bytes(q).view(m, -1)[:, :k]
    scale[at] = s


def write_per_channel(
    rows: torch.Tensor,
    pow2: bool,
    out: tuple[torch.Tensor, torch.Tensor],
    at: slice,
    block: bool = False,
) -> None:
    """Casts `rows`, whole blocks of 128, into the columns `at` of `out` of `empty_per_channel`."""
    r, n = rows.shape
    data_t, scale_t = out
    if block:
        tiles = pad_to_blocks(rows, 1).view(r // BLOCK, BLOCK, ceil_div(n, BLOCK), BLOCK)
        q, s = quantize_blocks(tiles, (1, 3), pow2)
    else:
        q, s = quantize_blocks(rows.view(r // BLOCK, BLOCK, n), (1,), pow2)
    as_bytes(data_t)[:, at] = as_bytes(q).view(r, -1)[:, :n].t()
    scale_t[:, at.start // BLOCK : at.stop // BLOCK] = s.t()


def cast_per_token(x: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """data[m, k] = e4m3(x[m, k] / scale[m, k // 128])."""
    x = x.contiguous()
    m, k = x.shape
    out = empty_per_token(m, k, x.device)
    for at in row_chunks(m, k):
        write_per_token(x[at], pow2, out, at)
    return out


def cast_per_block(w: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """data[e, n, k] = e4m3(w[e, n, k] / scale[e, n // 128, k // 128])."""
    e, n, k = w.shape
    nb, kb = ceil_div(n, BLOCK), ceil_div(k, BLOCK)
    blocks = pad_to_blocks(w.contiguous(), 1, 2).view(e, nb, BLOCK, kb, BLOCK)
    data, scale = quantize_blocks(blocks, (2, 4), pow2)
    data = data.view(e, nb * BLOCK, kb * BLOCK)[:, :n, :k].contiguous()
    return data, scale.contiguous()


def transpose_per_block(
    data: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """data_t[e, k, n] = data[e, n, k], scale_t likewise: exact, for 128 x 128 scales."""
    data_t = as_bytes(data).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    scale_t = scale.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return data_t.view(FP8_DTYPE), scale_t


def cast_per_block_both(
    w: torch.Tensor, pow2: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cast_per_block(w) and its transpose."""
    data, scale = cast_per_block(w, pow2)
    return data, scale, *transpose_per_block(data, scale)


def cast_rows_per_channel(
    rows: torch.Tensor, capacity: int, pow2: bool, block: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """data[n, r] = e4m3(rows[r, n] / scale[n, r // 128]), rows already padded to 128.

    With `block`, scale[n // 128, r // 128]. Columns from rows.shape[0] to `capacity` are undefined.
    """
    r, n = rows.shape
    out = empty_per_channel(n, capacity, rows.device, block)
    for at in row_chunks(r, n):
        write_per_channel(rows[at], pow2, out, at, block)
    return out


def cast_per_channel(
    x: torch.Tensor, group_ends: torch.Tensor, pow2: bool, block: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """data[n, c] = e4m3(x[r, n] / scale[n, c // 128]), each group starting at a multiple of 128.

    With `block`, scale[n // 128, c // 128].
    """
    spans = groups.bounds(group_ends, x.shape[0])
    padded = groups.padded_bounds(spans)
    used = padded[-1][1] if padded else 0
    rows = x.new_zeros((used, x.shape[1]))
    for (lo, hi), (start, _) in zip(spans, padded, strict=True):
        rows[start : start + hi - lo] = x[lo:hi]
    return cast_rows_per_channel(rows, padded_capacity(x.shape[0], len(spans)), pow2, block)
