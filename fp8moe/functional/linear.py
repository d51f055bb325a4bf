"""grouped_linear: one linear layer per group of rows, each of its three GEMMs in FP8 or BF16."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fp8moe.config import FP8Config
from fp8moe.functional import bf16
from fp8moe.functional.arguments import check_grouped_linear
from fp8moe.functional.autocast import autocast_off, result_dtype
from fp8moe.functional.main_grad import bf16_wgrad, fp8_wgrad, owner
from fp8moe.functional.observe import report
from fp8moe.functional.unfused import NoRows
from fp8moe.functional.weight_cache import bf16_weight, fp8_weight, held, hold
from fp8moe.kernels.cast import cast_per_channel, cast_per_token
from fp8moe.kernels.fp8tensor import FP8Tensor
from fp8moe.kernels.gemm import m_grouped_gemm_nt

Tensor = torch.Tensor

_FP8 = FP8Config()


class GroupedLinear(torch.autograd.Function):
    """y = x w^T per group. See `grouped_linear`.

    forward's last four arguments: the dtype of the result; whether gradients are enabled; what x, w
    and dy are called when they are observed; which rows of x and dy hold data (None: all).
    """

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

        # For dgrad a low-precision copy of w, or w itself; for wgrad x, or its FP8 columns.
        for_dgrad: tuple[Tensor | None, ...] = (None, None)
        if dgrad8:
            for_dgrad = hold(w, w8_t)
        elif need_x:
            for_dgrad = (bf16_weight(w, cache=True) if cache else w, None)
        for_wgrad: tuple[Tensor | None, ...] = (x if need_w else None, None)
        if need_w and config.wgrad == "fp8" and config.save == "fp8":
            for_wgrad = cast_per_channel(x, group_ends, config.pow2_scales, block=True)
        ctx.save_for_backward(group_ends, *for_dgrad, *for_wgrad, rows)
        ctx.config, ctx.kind = config, kinds[2]
        ctx.x_dtype, ctx.w_dtype = x.dtype, w.dtype
        ctx.w = owner(w) if need_w else None
        # Not a plain .to: where that returns y itself, torch 2.11 compiles zero gradients.
        return y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        group_ends, w, w_scale, x, x_scale, rows = ctx.saved_tensors
        config: FP8Config = ctx.config
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = dw = None
        dy = dy.contiguous()
        with autocast_off(dy.device):
            if need_x and config.dgrad == "fp8":
                w8_t = held(w, w_scale, pow2=config.pow2_weight_scales, transposed=True)
                dy8 = FP8Tensor(*cast_per_token(dy, config.pow2_scales))
                report(ctx.kind, dy8, rows)
                dx = m_grouped_gemm_nt(dy8, w8_t, group_ends).to(ctx.x_dtype)
            elif need_x:
                wb = bf16_weight(w, cache=False)
                dx = bf16.grouped_dgrad(dy.bfloat16(), wb, group_ends).to(ctx.x_dtype)
            if need_w and config.wgrad == "fp8":
                if x_scale is not None:
                    x_t = FP8Tensor(x, x_scale.contiguous())
                else:
                    x_t = FP8Tensor(
                        *cast_per_channel(x, group_ends, config.pow2_scales, block=True)
                    )
                dy_t = FP8Tensor(*cast_per_channel(dy, group_ends, config.pow2_scales, block=False))
                dw = fp8_wgrad(dy_t, x_t, group_ends, ctx.w, ctx.w_dtype)
            elif need_w:
                dw = bf16_wgrad(dy.bfloat16(), x.bfloat16(), group_ends, ctx.w, ctx.w_dtype)
        return dx, dw, None, None, None, None, None, None


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
    check_grouped_linear(x, w, group_ends, config)
    x, group_ends = x.contiguous(), group_ends.contiguous()
    dtype, grad = result_dtype(x), torch.is_grad_enabled()
    if x.shape[0] == 0:
        return NoRows.apply((0, w.shape[1]), dtype, x, w)
    with autocast_off(x.device):
        return GroupedLinear.apply(x, w, group_ends, config, dtype, grad, ("x", "w", "dy"), None)
