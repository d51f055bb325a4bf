"""swiglu_experts: the whole expert layer, fused around FP8 GEMMs or composed of its pieces.

The mathematics and the dataflow are in the package's docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import check_swiglu_experts
from fp8moe.functional.autocast import autocast_off, result_dtype
from fp8moe.functional.linear import GroupedLinear
from fp8moe.functional.main_grad import fp8_wgrad, owner
from fp8moe.functional.observe import observed, report
from fp8moe.functional.saved import restore
from fp8moe.functional.tokens import Tokens
from fp8moe.functional.unfused import (
    GatherSum,
    NoRows,
    Permutation,
    PermuteRows,
    WeightedSwiglu,
    weighted_gate,
)
from fp8moe.functional.weight_cache import fp8_weight, held, hold
from fp8moe.kernels.fp8tensor import BLOCK, FP8Tensor
from fp8moe.kernels.gemm import m_grouped_gemm_nt
from fp8moe.kernels.gemm_swiglu import m_grouped_gemm_swiglu
from fp8moe.kernels.gemm_swiglu_backward import m_grouped_gemm_swiglu_backward
from fp8moe.kernels.permute import gather_slots, gather_sum
from fp8moe.kernels.swiglu import swiglu_backward_cast, swiglu_cast

Tensor = torch.Tensor

Gate = Callable[[Tensor], Tensor]

_FP8 = FP8Config()


class SwigluExperts(torch.autograd.Function):
    """The fused path: all GEMMs in FP8, H and I multiples of 128.

    forward's last two arguments are the dtype of the result and whether gradients are enabled:
    under no_grad nothing is prepared for backward, though the weights say requires_grad.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        config: FP8Config,
        dtype: torch.dtype,
        grad: bool,
    ) -> Tensor:
        p = Permutation.of(topk_ids, w13.shape[0])
        rows = forward_rows(ctx, Tokens(x), topk_weights, p, w13, w2, config, grad)
        ctx.x_dtype = x.dtype
        y = gather_sum(rows, p.row_of_slot)
        # Not a plain .to: where that returns y itself, torch 2.11 compiles zero gradients.
        return y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        with autocast_off(dy.device):
            take_dy = partial(Tokens, dy.contiguous())
            dx, dp, dw13, dw2 = backward_rows(ctx, take_dy, gather_sum, gather_slots)
            dx = None if dx is None else dx.to(ctx.x_dtype)
        return dx, None, dp, dw13, dw2, None, None, None


def forward_rows(
    ctx: Any,
    x: Tokens,
    topk_weights: Tensor,
    p: Permutation,
    w13: Tensor,
    w2: Tensor,
    config: FP8Config,
    grad: bool,
) -> Tensor:
    """The fused path from the tokens to one output row per slot, unsummed.

    Args:
        ctx: of an autograd Function whose first five arguments are x, topk_ids, topk_weights, w13
            and w2; what `backward_rows` needs is saved there.
        x: (T, H), kept for backward as they are: if they are the caller's own, that takes no
            memory, and their cast repeats bit for bit.
        topk_weights: (T, K) float32.
        p: the permutation of the T x K slots.

    Returns: (Rcap, H) BF16 in the order of p.
    """
    need_x, _, need_p, need_w13, need_w2 = (grad and n for n in ctx.needs_input_grad[:5])
    pow2, pow2_w, cache = config.pow2_scales, config.pow2_weight_scales, config.cache_weights
    need_da = need_x or need_p or need_w13
    w13_8, w13_t = fp8_weight(w13, pow2=pow2_w, transposed=need_x and cache, cache=cache)
    w2_8, w2_t = fp8_weight(w2, pow2=pow2_w, transposed=need_da and cache, cache=cache)

    xp8 = x.rows(p.row_of_slot, p.slot_of_row, pow2)
    none = (None, None)
    saved_h: Any = none
    if config.save == "fp8" and (need_da or need_w2):
        a_data, a_scale, *saved_h = m_grouped_gemm_swiglu(
            xp8, w13_8, p.group_ends, topk_weights, p.slot_of_row, pow2
        )
        a8 = FP8Tensor(a_data, a_scale)
        del xp8
    else:
        h = m_grouped_gemm_nt(xp8, w13_8, p.group_ends)
        del xp8
        a8 = FP8Tensor(*swiglu_cast(h, topk_weights, p.slot_of_row, pow2))
        if config.save == "bf16":
            saved_h = (h, None)
        del h
    rows = m_grouped_gemm_nt(a8, w2_8, p.group_ends)
    if observed():
        report("x", x.fp8(pow2))
    report("w13", w13_8)
    report("act", a8, p.row_of_slot)
    report("w2", w2_8)

    if need_da or need_w2:
        if config.save == "fp8":
            report("h", FP8Tensor(*saved_h), p.row_of_slot)
        recompute = config.save == "recompute"
        ctx.save_for_backward(
            *(x if need_w13 or recompute else none),
            *saved_h,
            topk_weights,
            *p[:3],
            *(hold(w13, w13_t) if need_x else none),
            *(hold(w2, w2_t) if need_da else none),
            *(hold(w13, w13_8 if cache else None) if recompute else none),
        )
        ctx.config = config
        ctx.w13, ctx.w2 = owner(w13), owner(w2)
        ctx.w13_dtype, ctx.w2_dtype = w13.dtype, w2.dtype
    return rows


def backward_rows(
    ctx: Any,
    take_dy: Callable[[], Tokens],
    sum_rows: Callable[[Tensor, Tensor], Any],
    take_slots: Callable[[Tensor, Tensor], Any],
) -> tuple[Any, Any, Tensor | None, Tensor | None]:
    """The gradients that ctx.needs_input_grad asks for, from dy.

    Args:
        ctx: what `forward_rows` left.
        take_dy: gives dy, (T, H); called after what does not need it.
        sum_rows: makes dx of the permuted rows (Rcap, H) and row_of_slot. Called before the weight
            gradients: if it only starts something, they run meanwhile.
        take_slots: makes the gradient of topk_weights of its partial sums and row_of_slot,
            likewise.

    Returns: what sum_rows and take_slots returned, dw13, dw2; None where not asked for.
    """
    x_data, x_scale, h, h_scale, weights, row_of_slot, slot_of_row, ends, *held_w = (
        ctx.saved_tensors
    )
    config: FP8Config = ctx.config
    need_x, _, need_p, need_w13, need_w2 = ctx.needs_input_grad[:5]
    pow2, pow2_w, topk = config.pow2_scales, config.pow2_weight_scales, row_of_slot.shape[1]
    if config.save == "recompute":
        w13_8 = held(*held_w[4:], pow2=pow2_w, transposed=False)
        xp8 = Tokens(x_data, x_scale).rows(row_of_slot, slot_of_row, pow2)
        h = m_grouped_gemm_nt(xp8, w13_8, ends)
        del xp8
    elif h_scale is not None:
        h, h_scale = restore(h, h_scale)

    # dy's rows for dgrad and its columns for wgrad, each only if asked for.
    dy = take_dy()
    if observed():
        report("dy", dy.fp8(pow2))
    need_da = need_x or need_p or need_w13
    if need_da and need_w2:
        dyp8, dy_t = dy.both(slot_of_row, topk, pow2)
    elif need_da:
        dyp8 = dy.rows(row_of_slot, slot_of_row, pow2)
    else:
        dy_t = dy.columns(slot_of_row, topk, pow2, block=False)
    if need_da:
        w2_t = held(*held_w[2:4], pow2=pow2_w, transposed=True)
    if need_da and h_scale is not None:
        grads = m_grouped_gemm_swiglu_backward(
            dyp8, w2_t, ends, FP8Tensor(h, h_scale), weights, slot_of_row, pow2
        )
        del dyp8
    else:
        if need_da:
            da = m_grouped_gemm_nt(dyp8, w2_t, ends)
            del dyp8
        else:
            # Only dw2 is asked for: the pass below makes (p a)^T, which does not depend on da.
            da = torch.zeros((h.shape[0], h.shape[1] // 2), dtype=torch.bfloat16, device=h.device)
        grads = swiglu_backward_cast(h, h_scale, da, weights, slot_of_row, pow2)
        del da
    dh, dh_t, a_t = FP8Tensor(*grads[:2]), FP8Tensor(*grads[2:4]), FP8Tensor(*grads[4:6])
    dprob = grads[6]
    del h, h_scale, grads
    if need_da:
        report("dh", dh, row_of_slot)

    dx = dp = dw13 = dw2 = None
    if need_p:
        dp = take_slots(dprob, row_of_slot)
    if need_x:
        w13_t = held(*held_w[:2], pow2=pow2_w, transposed=True)
        dx = sum_rows(m_grouped_gemm_nt(dh, w13_t, ends), row_of_slot)
    del dh
    if need_w2:
        dw2 = fp8_wgrad(dy_t, a_t, ends, ctx.w2, ctx.w2_dtype)
        del dy_t
    del a_t
    if need_w13:
        x_t = Tokens(x_data, x_scale).columns(slot_of_row, topk, pow2, block=True)
        dw13 = fp8_wgrad(dh_t, x_t, ends, ctx.w13, ctx.w13_dtype)
    return dx, dp, dw13, dw2


def swiglu_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    config: FP8Config = _FP8,
) -> Tensor:
    """y[t] = sum_k p[t, k] (silu(g) * u) w2[e]^T, [g | u] = x[t] w13[e]^T, e = topk_ids[t, k].

    Differentiable in x, topk_weights (p), w13 and w2, once; a gradient that is not asked for costs
    no GEMM.

    Args:
        x: (T, H) BF16, FP16 or FP32.
        topk_ids: (T, K) int32 or int64, 0 to E; E itself drops the slot.
        topk_weights: (T, K), used in FP32.
        w13: (E, 2I, H) contiguous, BF16, FP16 or FP32: gate rows, then up rows.
        w2: (E, H, I) likewise. For FP8, H and I are multiples of 16; multiples of 128 are fast.
        config: the precision of each GEMM, the scales, and what is saved.

    Returns: (T, H), the dtype of x or, under autocast, autocast's.

    Raises: ValueError naming the argument, what was expected and what came. On the GPU a wrong id
        is found on the device, treated as dropped, and raised by a later operator or
        `fp8moe.check_errors`.

    Source: the module's docstring.
    """
    return gated_experts(x, topk_ids, topk_weights, w13, w2, None, config=config)


def gated_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    gate: Gate | None,
    *,
    config: FP8Config = _FP8,
) -> Tensor:
    """y[t] = sum_k p[t, k] gate(x[t] w13[e]^T) w2[e]^T: `swiglu_experts` with another gate.

    The GEMMs are the same; the gate runs in torch between them, so nothing is fused with it and
    save="fp8" keeps what torch's autograd keeps.

    Args:
        gate: (R, 2I) FP32 to (R, I), row by row, finite for zeros, differentiable; None: SwiGLU.
        x, topk_ids, topk_weights, w13, w2, config: as for `swiglu_experts`.

    Returns, Raises: as `swiglu_experts`.
    """
    check_swiglu_experts(x, topk_ids, topk_weights, w13, w2, config)
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    dtype, grad = result_dtype(x), torch.is_grad_enabled()
    if x.shape[0] == 0:
        return NoRows.apply(tuple(x.shape), dtype, x, topk_weights, w13, w2)
    topk_weights = topk_weights.float()
    with autocast_off(x.device):
        aligned = x.shape[1] % BLOCK == 0 and w2.shape[2] % BLOCK == 0
        if gate is None and config.all_fp8 and aligned:
            return SwigluExperts.apply(x, topk_ids, topk_weights, w13, w2, config, dtype, grad)
        y = _unfused_experts(x, topk_ids, topk_weights, w13, w2, config, grad, gate)
        return y.to(dtype)


def _unfused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    config: FP8Config,
    grad: bool,
    gate: Gate | None,
) -> Tensor:
    p = Permutation.of(topk_ids, w13.shape[0])
    rows, slots = p.row_of_slot, p.slot_of_row

    def permuted(x: Tensor) -> Tensor:
        return PermuteRows.apply(x, rows, slots)

    y = unfused_rows(permuted, x.bfloat16(), topk_weights, p, w13, w2, config, grad, gate)
    return GatherSum.apply(y, rows, slots)


def unfused_rows(
    permuted: Callable[[Tensor], Tensor],
    x: Tensor,
    topk_weights: Tensor,
    p: Permutation,
    w13: Tensor,
    w2: Tensor,
    config: FP8Config,
    grad: bool,
    gate: Gate | None = None,
) -> Tensor:
    """The layer composed of its pieces, up to one output row per slot, unsummed; differentiable.

    Args:
        permuted: gives the rows (Rcap, H) BF16 in the order of p, of x. With save="recompute" it is
            called again in backward.
        gate: in place of SwiGLU.

    Returns: (Rcap, H) BF16 in the order of p.
    """
    rows, slots, ends, _ = p

    def linear(rows_in: Tensor, w: Tensor, kinds: tuple[str, str, str]) -> Tensor:
        args = (config, torch.bfloat16, torch.is_grad_enabled(), kinds, rows)
        return GroupedLinear.apply(rows_in, w, ends, *args)

    def activation(x: Tensor, topk_weights: Tensor) -> Tensor:
        h = linear(permuted(x), w13, ("x", "w13", "dh"))
        if gate is not None:
            return weighted_gate(gate, h, topk_weights, slots)
        return WeightedSwiglu.apply(h, topk_weights, rows, slots, config)

    if config.save == "recompute" and grad:
        a = checkpoint(activation, x, topk_weights, use_reentrant=False, preserve_rng_state=False)
    else:
        a = activation(x, topk_weights)
    return linear(a, w2, ("act", "w2", "dy"))
