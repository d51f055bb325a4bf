"""SwiGLU with the routing weight folded in, its backward pass, and the casts that follow."""

from __future__ import annotations

import torch

from fp8moe.kernels.fp8tensor import BLOCK, ceil_div, empty_per_channel
from fp8moe.kernels.reference.cast import (
    empty_per_token,
    pad_to_blocks,
    row_chunks,
    write_per_channel,
    write_per_token,
)
from fp8moe.kernels.reference.dequantize import dequantize_per_token
from fp8moe.kernels.reference.permute import used_rows


def _weight_of_row(topk_weights: torch.Tensor, slot_of_row: torch.Tensor) -> torch.Tensor:
    """p[r, 1] = topk_weights[slot_of_row[r]], 0 in padding."""
    if topk_weights.numel() == 0:
        return torch.zeros((slot_of_row.numel(), 1), device=slot_of_row.device)
    p = topk_weights.reshape(-1)[slot_of_row.clamp_min(0).long()]
    return p.masked_fill_(slot_of_row < 0, 0.0).unsqueeze(1)


def _zero_padding(slot_of_row: torch.Tensor, *rows: torch.Tensor) -> None:
    """Zeros the rows of padding, which hold whatever their inputs held, NaN included."""
    pad = (slot_of_row < 0).nonzero().squeeze(1)
    if pad.numel():
        for x in rows:
            x.index_fill_(0, pad, 0)


def swiglu_rows(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor
) -> torch.Tensor:
    """aw[r, i] = bf16(p[r] * (silu(g[r, i]) * u[r, i])), h = [g | u]; zero in padding."""
    g, u = h.float().chunk(2, dim=1)
    a = g / torch.exp(-g).add_(1)
    a *= u
    a *= _weight_of_row(topk_weights, slot_of_row)
    aw = a.bfloat16()
    _zero_padding(slot_of_row, aw)
    return aw


def swiglu_backward_rows(
    h: torch.Tensor, da: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dh = [p * da * u * s * (1 + g * (1 - s)) | p * da * silu(g)], s = sigmoid(g), as bf16.

    Returns:
        dh (R, 2I) bf16; aw (R, I) bf16, the forward activation; dprob_partial (ceil(I/128), R)
        float32, sum of da * silu(g) * u over each 128 columns. All zero where slot_of_row < 0.
    """
    rows, i = da.shape
    g, u = h.float().chunk(2, dim=1)
    grad = da.float()
    p = _weight_of_row(topk_weights, slot_of_row)
    denominator = torch.exp(-g).add_(1)
    silu = g / denominator
    s = denominator.reciprocal_()
    a = silu * u
    partial = pad_to_blocks(grad * a, 1).view(rows, ceil_div(i, BLOCK), BLOCK).sum(2)
    grad = grad * p
    dh = torch.empty(h.shape, dtype=torch.bfloat16, device=h.device)
    dh[:, i:] = grad * silu
    slope = (1 - s).mul_(g).add_(1)
    dh[:, :i] = grad.mul_(u).mul_(s).mul_(slope)
    aw = a.mul_(p).bfloat16()
    _zero_padding(slot_of_row, dh, aw, partial)
    return dh, aw, partial.t()


def swiglu_cast(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """cast_per_token(aw), aw[r, i] = bf16(p[r] * silu(g[r, i]) * u[r, i]), h = [g | u]."""
    i = h.shape[1] // 2
    out = empty_per_token(len(h), i, h.device)
    for at in row_chunks(used_rows(slot_of_row), 2 * i):
        write_per_token(swiglu_rows(h[at], topk_weights, slot_of_row[at]), pow2, out, at)
    return out


def swiglu_cast_both(
    h: torch.Tensor, topk_weights: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """swiglu_cast(h), and cast_per_token(h) with zeros in padding."""
    out = empty_per_token(h.shape[0], h.shape[1], h.device)
    for at in row_chunks(used_rows(slot_of_row), h.shape[1]):
        rows = h[at].clone()
        _zero_padding(slot_of_row[at], rows)
        write_per_token(rows, pow2, out, at)
    return *swiglu_cast(h, topk_weights, slot_of_row, pow2), *out


def swiglu_backward_cast(
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    da: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """swiglu_backward_rows of h (times h_scale), then dh cast both ways and aw^T per block.

    Returns:
        dh, dh_scale (per_token); dh_t, dh_t_scale (per_channel); aw_t (I, Rcap), aw_t_scale
        (ceil(I/128), Rcap/128) (per_block); dprob_partial.
    """
    capacity, i = da.shape
    dh = empty_per_token(capacity, 2 * i, h.device)
    dh_t = empty_per_channel(2 * i, capacity, h.device)
    aw_t = empty_per_channel(i, capacity, h.device, block=True)
    dprob_partial = torch.empty((ceil_div(i, BLOCK), capacity), device=h.device)
    for at in row_chunks(used_rows(slot_of_row), 2 * i):
        rows = h[at] if h_scale is None else dequantize_per_token(h[at], h_scale[at])
        dh_rows, aw_rows, dprob_partial[:, at] = swiglu_backward_rows(
            rows, da[at], topk_weights, slot_of_row[at]
        )
        write_per_token(dh_rows, pow2, dh, at)
        write_per_channel(dh_rows, pow2, dh_t, at)
        write_per_channel(aw_rows, pow2, aw_t, at, block=True)
    return *dh, *dh_t, *aw_t, dprob_partial
