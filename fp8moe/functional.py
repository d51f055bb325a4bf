"""grouped_linear and swiglu_experts: expert layers whose fprop, dgrad and wgrad run in FP8.

One expert's linear layer is y = x w^T, with x (m, K), w (N, K), y (m, N). Its three GEMMs are

    fprop   y  = x  w^T      sum over K     x rows,       w rows
    dgrad   dx = dy w        sum over N     dy rows,      w columns
    wgrad   dw = dy^T x      sum over m     dy columns,   x columns

FP8 tensor cores read both operands along the summed dimension, and so do the scales, 128 elements
each. x and dy are therefore cast twice, along their rows (per_token, 1x128) for fprop and dgrad and
along tokens (per_channel, 128x1) for wgrad; w has 128x128 scales, which serve both directions, so
its transpose is a transpose of bytes.

The SwiGLU expert layer, for token t with experts e = topk_ids[t, k] and weights p = topk_weights:

    h = x w13^T = [g | u]      a = silu(g) * u      y[t] = sum_k (p a) w2^T

The routing weight p multiplies the activation and not the output. Then the combine is a plain sum,
y is not needed in backward, dy is the same for all K rows of a token, and with da' = dy w2

    dp = <da', a>     dg = p da' u s (1 + g (1 - s)), s = sigmoid(g)     du = p da' silu(g)
    dw2 = dy^T (p a)      dw13 = [dg | du]^T x      dx[t] = sum_k [dg | du] w13

A 1x128 scale belongs to one token, so x and dy are cast once per token, and the permutation to
experts copies bytes. Everything between two GEMMs is one pass over memory:

    forward   route, cast x, permute -> h -> SwiGLU * p + cast -> y rows -> sum
    backward  cast dy, permute (rows and columns) -> da' -> SwiGLU' + all casts
              -> dw2 -> dx rows -> sum; permute x to columns -> dw13

With a GEMM in BF16, or H or I not a multiple of 128, the layer is composed of the functions in
unfused.py and of `grouped_linear`: the same mathematics, more passes.

Nothing here reads a count on the host. A parameter that carries an FP32 `main_grad` gets its wgrad
added there by the GEMM itself; then its autograd gradient is None and `grad_added_to_main_grad` is
set. Sources: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3, for scales and
accumulation; Megatron-LM for folding p into the activation and for `main_grad`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fp8moe import arguments, bf16
from fp8moe.config import FP8Config
from fp8moe.kernels.cast import cast_per_channel, cast_per_token
from fp8moe.kernels.fp8tensor import BLOCK, FP8Tensor
from fp8moe.kernels.gemm import m_grouped_gemm_nt
from fp8moe.kernels.permute import (
    gather_slots,
    gather_sum,
    permute_fp8,
    permute_fp8_both,
    permute_fp8_to_channel,
)
from fp8moe.kernels.swiglu import swiglu_backward_cast, swiglu_cast
from fp8moe.main_grad import bf16_wgrad, fp8_wgrad, owner
from fp8moe.observe import observe_fp8, report
from fp8moe.unfused import (
    GatherSum,
    NoRows,
    Permutation,
    PermuteRows,
    WeightedSwiglu,
    compress,
    expand,
)
from fp8moe.weight_cache import bf16_weight, clear_weight_cache, fp8_weight, weight_cache_info

__all__ = [
    "clear_weight_cache",
    "grouped_linear",
    "observe_fp8",
    "swiglu_experts",
    "weight_cache_info",
]

Tensor = torch.Tensor

_FP8 = FP8Config()


def _autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast must not turn our FP32 arithmetic into BF16; entered only where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _result_dtype(x: Tensor) -> torch.dtype:
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        group_ends: Tensor,
        config: FP8Config,
        dtype: torch.dtype,
        grad: bool,
        kinds: tuple[str, str, str],
        rows: Tensor | None,
    ) -> Tensor:
        need_x, need_w = (grad and need for need in ctx.needs_input_grad[:2])
        cache = config.cache_weights
        dgrad8 = need_x and config.dgrad == "fp8"
        w8_t = None
        if config.fprop == "fp8" or (dgrad8 and cache):
            pow2 = config.pow2_weight_scales
            w8, w8_t = fp8_weight(w, pow2=pow2, transposed=dgrad8 and cache, cache=cache)
        if config.fprop == "fp8":
            x8 = FP8Tensor(*cast_per_token(x, config.pow2_scales))
            report(kinds[0], x8, rows)
            report(kinds[1], w8)
            y = m_grouped_gemm_nt(x8, w8, group_ends)
        else:
            y = bf16.grouped_linear(x.bfloat16(), bf16_weight(w, cache=cache), group_ends)

        # dgrad: a cached low-precision copy, or w to be cast again. wgrad: x, or its FP8 columns.
        for_dgrad: tuple[Tensor | None, ...] = (w if need_x else None, None)
        if dgrad8 and cache:
            for_dgrad = tuple(w8_t or (None, None))
        elif need_x and cache:
            for_dgrad = (bf16_weight(w, cache=True), None)
        for_wgrad: tuple[Tensor | None, ...] = (x if need_w else None, None)
        if need_w and config.wgrad == "fp8" and config.save == "fp8":
            for_wgrad = cast_per_channel(x, group_ends, config.pow2_scales)
        ctx.save_for_backward(group_ends, *for_dgrad, *for_wgrad, rows)
        ctx.config, ctx.kind = config, kinds[2]
        ctx.x_dtype, ctx.w_dtype = x.dtype, w.dtype
        ctx.w = owner(w) if need_w else None
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        group_ends, w, w_scale, x, x_scale, rows = ctx.saved_tensors
        config: FP8Config = ctx.config
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = dw = None
        dy = dy.contiguous()
        with _autocast_off(dy.device):
            if need_x and config.dgrad == "fp8":
                w8_t: Any = FP8Tensor(w, w_scale)
                if w_scale is None:
                    pow2 = config.pow2_weight_scales
                    _, w8_t = fp8_weight(w, pow2=pow2, transposed=True, cache=False)
                dy8 = FP8Tensor(*cast_per_token(dy, config.pow2_scales))
                report(ctx.kind, dy8, rows)
                dx = m_grouped_gemm_nt(dy8, w8_t, group_ends).to(ctx.x_dtype)
            elif need_x:
                wb = bf16_weight(w, cache=False)
                dx = bf16.grouped_dgrad(dy.bfloat16(), wb, group_ends).to(ctx.x_dtype)
            if need_w and config.wgrad == "fp8":
                x_t = FP8Tensor(x, x_scale)
                if x_scale is None:
                    x_t = FP8Tensor(*cast_per_channel(x, group_ends, config.pow2_scales))
                dy_t = FP8Tensor(*cast_per_channel(dy, group_ends, config.pow2_scales))
                dw = fp8_wgrad(dy_t, x_t, group_ends, ctx.w, ctx.w_dtype)
            elif need_w:
                dw = bf16_wgrad(dy.bfloat16(), x.bfloat16(), group_ends, ctx.w, ctx.w_dtype)
        return dx, dw, None, None, None, None, None, None


class _SwigluExperts(torch.autograd.Function):
    """The fused path: all GEMMs in FP8, H and I multiples of 128."""

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
        need_x, _, need_p, need_w13, need_w2 = (grad and n for n in ctx.needs_input_grad[:5])
        pow2, pow2_w, cache = config.pow2_scales, config.pow2_weight_scales, config.cache_weights
        need_da = need_x or need_p or need_w13
        w13_8, w13_t = fp8_weight(w13, pow2=pow2_w, transposed=need_x and cache, cache=cache)
        w2_8, w2_t = fp8_weight(w2, pow2=pow2_w, transposed=need_da and cache, cache=cache)

        p = Permutation.of(topk_ids, w13.shape[0])
        x8 = FP8Tensor(*cast_per_token(x, pow2))
        xp8 = FP8Tensor(*permute_fp8(*x8, p.slot_of_row, topk_ids.shape[1]))
        h = m_grouped_gemm_nt(xp8, w13_8, p.group_ends)
        del xp8
        a8 = FP8Tensor(*swiglu_cast(h, topk_weights, p.slot_of_row, pow2))
        y = gather_sum(m_grouped_gemm_nt(a8, w2_8, p.group_ends), p.row_of_slot)
        report("x", x8)
        report("w13", w13_8)
        report("act", a8, p.row_of_slot)
        report("w2", w2_8)

        if need_da or need_w2:
            none = (None, None)
            recompute = config.save == "recompute"
            saved_h: Any = (h, None)
            if config.save == "fp8":
                saved_h = compress(h, p.row_of_slot, config)
            weights: tuple[Any, ...] = (*(w13_t or none), *(w2_t or none), *none)
            if not cache:
                weights = (w13, None, w2 if need_da else None, None, *none)
            elif recompute:
                weights = (*weights[:4], *w13_8)
            ctx.save_for_backward(
                *(x8 if need_w13 or recompute else none),
                *(none if recompute else saved_h),
                topk_weights,
                *p[:3],
                *weights,
            )
            ctx.config, ctx.x_dtype = config, x.dtype
            ctx.w13, ctx.w2 = owner(w13), owner(w2)
            ctx.w13_dtype, ctx.w2_dtype = w13.dtype, w2.dtype
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        with _autocast_off(dy.device):
            return _swiglu_experts_backward(ctx, dy.contiguous())


def _saved_weights(ctx: Any, saved: tuple[Any, ...]) -> tuple[FP8Tensor, FP8Tensor, FP8Tensor]:
    """w13^T, w2^T and w13 in FP8; cast again when the config says to hold nothing."""
    if ctx.config.cache_weights:
        return FP8Tensor(*saved[0:2]), FP8Tensor(*saved[2:4]), FP8Tensor(*saved[4:6])
    need_x, recompute = ctx.needs_input_grad[0], ctx.config.save == "recompute"
    pow2 = ctx.config.pow2_weight_scales
    none: Any = FP8Tensor(None, None)  # type: ignore[arg-type]
    w13_8, w13_t, w2_t = none, none, none
    if need_x or recompute:
        w13_8, w13_t = fp8_weight(saved[0], pow2=pow2, transposed=need_x, cache=False)
    if saved[2] is not None:
        _, w2_t = fp8_weight(saved[2], pow2=pow2, transposed=True, cache=False)
    return w13_t, w2_t, w13_8


def _swiglu_experts_backward(ctx: Any, dy: Tensor) -> Any:
    x_data, x_scale, h, h_scale, weights, row_of_slot, slot_of_row, ends, *saved = ctx.saved_tensors
    config: FP8Config = ctx.config
    need_x, _, need_p, need_w13, need_w2 = ctx.needs_input_grad[:5]
    pow2, topk = config.pow2_scales, row_of_slot.shape[1]
    x8 = FP8Tensor(x_data, x_scale)
    w13_t, w2_t, w13_8 = _saved_weights(ctx, saved)

    if config.save == "recompute":
        xp8 = FP8Tensor(*permute_fp8(*x8, slot_of_row, topk))
        h = m_grouped_gemm_nt(xp8, w13_8, ends)
        del xp8
    elif h_scale is not None:
        h = expand(FP8Tensor(h, h_scale), config)

    # dy once per token, then its rows for dgrad and its columns for wgrad, each only if asked for.
    dy8 = FP8Tensor(*cast_per_token(dy, pow2))
    report("dy", dy8)
    need_da = need_x or need_p or need_w13
    if need_da and need_w2:
        *dyp8, dy_data_t, dy_scale_t = permute_fp8_both(*dy8, slot_of_row, topk, pow2)
        dy_t = FP8Tensor(dy_data_t, dy_scale_t)
    elif need_da:
        dyp8 = list(permute_fp8(*dy8, slot_of_row, topk))
    else:
        dy_t = FP8Tensor(*permute_fp8_to_channel(*dy8, slot_of_row, topk, pow2))
    if need_da:
        da = m_grouped_gemm_nt(FP8Tensor(*dyp8), w2_t, ends)
        del dyp8
    else:
        # Only dw2 is asked for: the pass below makes (p a)^T, which does not depend on da.
        da = torch.zeros((h.shape[0], h.shape[1] // 2), dtype=torch.bfloat16, device=h.device)
    *dh8, dh_data_t, dh_scale_t, a_data_t, a_scale_t, dprob = swiglu_backward_cast(
        h, da, weights, slot_of_row, pow2
    )
    del h, da
    dh = FP8Tensor(*dh8)
    if need_da:
        report("dh", dh, row_of_slot)

    dx = dp = dw13 = dw2 = None
    if need_w2:
        dw2 = fp8_wgrad(dy_t, FP8Tensor(a_data_t, a_scale_t), ends, ctx.w2, ctx.w2_dtype)
        del dy_t
    if need_x:
        dx = gather_sum(m_grouped_gemm_nt(dh, w13_t, ends), row_of_slot).to(ctx.x_dtype)
    if need_w13:
        x_t = FP8Tensor(*permute_fp8_to_channel(*x8, slot_of_row, topk, pow2))
        dh_t = FP8Tensor(dh_data_t, dh_scale_t)
        dw13 = fp8_wgrad(dh_t, x_t, ends, ctx.w13, ctx.w13_dtype)
    if need_p:
        dp = gather_slots(dprob, row_of_slot)
    return dx, None, dp, dw13, dw2, None, None, None


def grouped_linear(x: Tensor, w: Tensor, group_ends: Tensor, *, config: FP8Config = _FP8) -> Tensor:
    """y[r, n] = sum_k x[r, k] w[g, n, k], g the group of row r; differentiable in x and w.

    Args:
        x: (R, K) BF16, FP16 or FP32. Group g is the rows group_ends[g-1] to group_ends[g].
        w: (E, N, K) contiguous, BF16, FP16 or FP32. For FP8, N and K are multiples of 16.
        group_ends: (E,) int32 on the device of x, cumulative. Groups of any size, also empty.
        config: the precision of each GEMM. save="fp8" keeps x for an FP8 wgrad as FP8 columns made
            in forward; otherwise x itself is kept.

    Returns: (R, N), the dtype of x or, under autocast, autocast's. Rows from group_ends[-1] on are
        undefined, in y and in the gradient of x.

    Raises: ValueError naming the argument, what was expected and what came.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
    """
    x, group_ends = x.contiguous(), group_ends.contiguous()
    arguments.check_grouped_linear(x, w, group_ends, config)
    dtype, grad = _result_dtype(x), torch.is_grad_enabled()
    if x.shape[0] == 0:
        return NoRows.apply((0, w.shape[1]), dtype, x, w)
    with _autocast_off(x.device):
        return _GroupedLinear.apply(x, w, group_ends, config, dtype, grad, ("x", "w", "dy"), None)


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
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    arguments.check_swiglu_experts(x, topk_ids, topk_weights, w13, w2, config)
    dtype, grad = _result_dtype(x), torch.is_grad_enabled()
    if x.shape[0] == 0:
        return NoRows.apply(tuple(x.shape), dtype, x, topk_weights, w13, w2)
    topk_weights = topk_weights.float()
    with _autocast_off(x.device):
        if config.all_fp8 and x.shape[1] % BLOCK == 0 and w2.shape[2] % BLOCK == 0:
            return _SwigluExperts.apply(x, topk_ids, topk_weights, w13, w2, config, dtype, grad)
        y = _unfused_experts(x, topk_ids, topk_weights, w13, w2, config, grad)
        return y.to(dtype)


def _unfused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    config: FP8Config,
    grad: bool,
) -> Tensor:
    rows, slots, ends, _ = Permutation.of(topk_ids, w13.shape[0])

    def linear(rows_in: Tensor, w: Tensor, kinds: tuple[str, str, str]) -> Tensor:
        args = (config, torch.bfloat16, torch.is_grad_enabled(), kinds, rows)
        return _GroupedLinear.apply(rows_in, w, ends, *args)

    def activation(x: Tensor, topk_weights: Tensor) -> Tensor:
        xp = PermuteRows.apply(x, rows, slots)
        h = linear(xp, w13, ("x", "w13", "dh"))
        return WeightedSwiglu.apply(h, topk_weights, rows, slots, config)

    x = x.bfloat16()
    if config.save == "recompute" and grad:
        a = checkpoint(activation, x, topk_weights, use_reentrant=False, preserve_rng_state=False)
    else:
        a = activation(x, topk_weights)
    return GatherSum.apply(linear(a, w2, ("act", "w2", "dy")), rows, slots)
