"""The GEMMs: dequantize each operand once, one FP32 matmul per group."""

from __future__ import annotations

import torch

from fp8moe.kernels.fp8tensor import BLOCK
from fp8moe.kernels.reference import groups
from fp8moe.kernels.reference.dequantize import dequantize_per_block, dequantize_per_token
from fp8moe.kernels.reference.swiglu import swiglu_backward_cast, swiglu_cast_both


def gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[m, n] = sum_k A[m, k] * B[n, k]."""
    out.copy_(dequantize_per_token(a, a_scale) @ dequantize_per_block(b, b_scale).t())


def m_grouped_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[m, n] = sum_k A[m, k] * B[g, n, k], g the group of row m; rows past the last end stay."""
    for g, (lo, hi) in enumerate(groups.bounds(group_ends, a.shape[0])):
        if hi > lo:
            x = dequantize_per_token(a[lo:hi], a_scale[lo:hi])
            out[lo:hi] = x @ dequantize_per_block(b[g], b_scale[g]).t()


def m_grouped_gemm_swiglu(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """swiglu_cast_both(m_grouped_gemm_nt(a, b))."""
    h = torch.empty((a.shape[0], b.shape[1]), dtype=torch.bfloat16, device=a.device)
    m_grouped_gemm_nt(a, a_scale, b, b_scale, group_ends, h)
    return swiglu_cast_both(h, topk_weights, slot_of_row, pow2)


def m_grouped_gemm_swiglu_backward(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    h: torch.Tensor,
    h_scale: torch.Tensor,
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
    """swiglu_backward_cast(h, m_grouped_gemm_nt(a, b))."""
    da = torch.empty((a.shape[0], b.shape[1]), dtype=torch.bfloat16, device=a.device)
    m_grouped_gemm_nt(a, a_scale, b, b_scale, group_ends, da)
    groups.check_aligned(group_ends)
    return swiglu_backward_cast(h, h_scale, da, topk_weights, slot_of_row, pow2)


def m_grouped_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_sizes: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[g, m, n] = sum_k A[g, m, k] * B[g, n, k] for m < group_sizes[g]; other rows stay."""
    for g, size in enumerate(groups.sizes(group_sizes, a.shape[1])):
        if size:
            x = dequantize_per_token(a[g, :size], a_scale[g, :size])
            out[g, :size] = x @ dequantize_per_block(b[g], b_scale[g]).t()


def k_grouped_gemm(
    a_t: torch.Tensor,
    a_scale: torch.Tensor,
    b_t: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """out[g, n, k] (+)= sum_r A_t[n, r] * B_t[k, r] over the columns r of group g.

    An empty group gives zeros, or leaves `out` as it is when accumulating. The pad columns take
    part, as in the kernel: they are zero.
    """
    spans = groups.bounds(group_ends, a_t.shape[1])
    for g, (lo, hi) in enumerate(groups.padded_bounds(spans)):
        blocks = slice(lo // BLOCK, hi // BLOCK)
        x = dequantize_per_token(a_t[:, lo:hi], a_scale[:, blocks])
        y = dequantize_per_block(b_t[:, lo:hi], b_scale[:, blocks])
        product = x @ y.t()
        out[g] = out[g] + product if accumulate else product
