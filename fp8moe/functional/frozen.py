"""frozen_swiglu_experts: experts whose weights exist only in FP8, with low-rank updates.

A frozen weight has no gradient, so one FP8 copy of it serves everything: fprop reads it as it is
and dgrad reads its transpose, which is a transpose of bytes, stored or made when it is needed.

What is trained is a low-rank update of each expert's two matrices,

    h = x w13^T + s (x A13^T) B13^T        a = silu(g) * u        y = a w2^T + s (a A2^T) B2^T

whose GEMMs run in BF16: they are a few per cent of the work, and a rank below 128 would leave most
of an FP8 scale block empty. Every activation that reaches a GEMM of a frozen weight is rounded to
FP8; the update of w2 gets the same rounded activation, the update of w13 the unrounded x. Without
updates, with BF16 x and power-of-two scales, the result equals `swiglu_experts` on the dequantized
weights bit for bit.

Sources: Hu et al., LoRA (arXiv 2106.09685), section 4.1, for s, A and B; the package's docstring
for the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import FLOATS, check_config, check_some, check_tokens
from fp8moe.functional.autocast import autocast_off, result_dtype
from fp8moe.functional.linear import GroupedLinear
from fp8moe.functional.observe import report
from fp8moe.functional.saved import expand, restore
from fp8moe.functional.unfused import GatherSum, NoRows, Permutation, PermuteRows
from fp8moe.kernels.arguments import check_multiple, check_tensor
from fp8moe.kernels.cast import cast_per_token, transpose_per_block
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor
from fp8moe.kernels.gemm import m_grouped_gemm_nt
from fp8moe.kernels.permute import gather_slots
from fp8moe.kernels.swiglu import swiglu_backward_cast, swiglu_cast, swiglu_cast_both

Tensor = torch.Tensor

_FP8 = FP8Config()
_BF16 = FP8Config.bf16()

RANK_UNIT = 8
"""Ranks are multiples of it: torch's grouped GEMM wants rows of whole 16 bytes."""


class LowRank(NamedTuple):
    """The update scaling * b[e] @ a[e] of expert e's weight (N, K).

    Args:
        a: (E, r, K), BF16, FP16 or FP32, r a multiple of 8.
        b: (E, N, r) likewise.
        scaling: usually alpha / r.
        dropout: probability with which each element of the input of a is dropped.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0


class FrozenLinear(torch.autograd.Function):
    """y[r] = x[r] w[g]^T, dx[r] = dy[r] w[g], both in FP8; w has no gradient.

    forward's arguments: x (R, K); w's data and scale; its transpose's, or None to make it in
    backward; group_ends; config; what x, w and dy are called when they are observed; which rows
    hold data.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        data: Tensor,
        scale: Tensor,
        data_t: Tensor | None,
        scale_t: Tensor | None,
        group_ends: Tensor,
        config: FP8Config,
        kinds: tuple[str, str, str],
        rows: Tensor,
    ) -> Tensor:
        w = FP8Tensor(data, scale)
        x8 = FP8Tensor(*cast_per_token(x, config.pow2_scales))
        report(kinds[0], x8, rows)
        report(kinds[1], w)
        ctx.save_for_backward(data, scale, data_t, scale_t, group_ends, rows)
        ctx.pow2, ctx.kind = config.pow2_scales, kinds[2]
        return m_grouped_gemm_nt(x8, w, group_ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        data, scale, data_t, scale_t, group_ends, rows = ctx.saved_tensors
        if data_t is None:
            data_t, scale_t = transpose_per_block(data, scale)
        with autocast_off(dy.device):
            dy8 = FP8Tensor(*cast_per_token(dy.contiguous(), ctx.pow2))
            report(ctx.kind, dy8, rows)
            dx = m_grouped_gemm_nt(dy8, FP8Tensor(data_t, scale_t), group_ends)
        return dx, *[None] * 8


class RoundedSwiglu(torch.autograd.Function):
    """aw[r] = fp8(p[r] * silu(g[r]) * u[r]), h = [g | u], as BF16; dh is rounded to FP8 likewise.

    The next GEMM casts what comes from here once more, which then changes nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        topk_weights: Tensor,
        row_of_slot: Tensor,
        slot_of_row: Tensor,
        config: FP8Config,
    ) -> Tensor:
        ctx.config = config
        saved: Any = (h, None)
        if config.save == "fp8":
            data, scale, *saved = swiglu_cast_both(h, topk_weights, slot_of_row, config.pow2_scales)
            report("h", FP8Tensor(*saved), row_of_slot)
        else:
            data, scale = swiglu_cast(h, topk_weights, slot_of_row, config.pow2_scales)
        ctx.save_for_backward(*saved, topk_weights, row_of_slot, slot_of_row)
        return expand(FP8Tensor(data, scale), config)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> Any:
        h, h_scale, topk_weights, row_of_slot, slot_of_row = ctx.saved_tensors
        config: FP8Config = ctx.config
        if h_scale is not None:
            h, h_scale = restore(h, h_scale)
        need_h, need_p = ctx.needs_input_grad[:2]
        data, scale, *_, dprob = swiglu_backward_cast(
            h, h_scale, da.contiguous(), topk_weights, slot_of_row, config.pow2_scales
        )
        dh = expand(FP8Tensor(data, scale), config) if need_h else None
        dp = gather_slots(dprob, row_of_slot) if need_p else None
        return dh, dp, None, None, None


def _low_rank(x: Tensor, w: LowRank, group_ends: Tensor, rows: Tensor) -> Tensor:
    """scaling * (x a^T) b^T per group, in BF16."""
    args = (_BF16, torch.bfloat16, torch.is_grad_enabled(), ("x", "w", "dy"), rows)
    if w.dropout:
        x = F.dropout(x, w.dropout)
    inner = GroupedLinear.apply(x, w.a, group_ends, *args)
    return GroupedLinear.apply(inner * w.scaling, w.b, group_ends, *args)


def _check_weight(name: str, w: FP8Tensor, shape: tuple[int | str, ...], device: Any) -> None:
    check_tensor(f"{name}.data", w.data, shape, (FP8_DTYPE,), device)
    e, n, k = w.data.shape
    check_multiple(f"{name}: rows of an expert", n, BLOCK)
    check_multiple(f"{name}: columns", k, BLOCK)
    check_tensor(f"{name}.scale", w.scale, (e, n // BLOCK, k // BLOCK), (torch.float32,), device)


def _check_low_rank(name: str, low: LowRank | None, w: FP8Tensor) -> None:
    if low is None:
        return
    e, n, k = w.data.shape
    check_tensor(f"{name}.a", low.a, (e, "rank", k), FLOATS, w.data.device)
    rank = low.a.shape[1]
    check_some(f"{name}.a: rank", rank)
    check_multiple(f"{name}.a: rank", rank, RANK_UNIT)
    check_tensor(f"{name}.b", low.b, (e, n, rank), FLOATS, w.data.device)
    if not 0 <= low.dropout < 1:
        raise ValueError(f"{name}.dropout: expected 0 <= dropout < 1, got {low.dropout}")


def check_frozen_config(config: FP8Config) -> None:
    """Raise ValueError unless `config` is one that frozen experts can run."""
    check_config(config)
    if (config.fprop, config.dgrad) != ("fp8", "fp8"):
        raise ValueError(
            "config: frozen experts have no weights but FP8 ones; expected fprop='fp8' and "
            f"dgrad='fp8', got fprop={config.fprop!r} and dgrad={config.dgrad!r}"
        )


def frozen_swiglu_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: FP8Tensor,
    w2: FP8Tensor,
    *,
    w13_t: FP8Tensor | None = None,
    w2_t: FP8Tensor | None = None,
    low_rank13: LowRank | None = None,
    low_rank2: LowRank | None = None,
    config: FP8Config = _FP8,
) -> Tensor:
    """y[t] = sum_k p[t, k] (silu(g) * u) W2[e]^T, [g | u] = x[t] W13[e]^T, W = w + s b a.

    Differentiable in x, topk_weights (p) and the low-rank factors, once.

    Args:
        x: (T, H) BF16, FP16 or FP32; H a multiple of 128.
        topk_ids: (T, K) int32 or int64, 0 to E; E itself drops the slot.
        topk_weights: (T, K), used in FP32.
        w13: per_block data (E, 2I, H), scale (E, 2I/128, H/128); gate rows, then up rows; I a
            multiple of 128.
        w2: per_block data (E, H, I), scale (E, H/128, I/128).
        w13_t, w2_t: their transposes, from `quant.transpose_per_block`. None: made anew in every
            backward, and gone after it, which costs one pass over the bytes and saves as many as
            the weights have.
        low_rank13, low_rank2: updates of w13 and w2.
        config: scales, and what is saved of h; its `wgrad` and weight fields have no meaning here.
            The low-rank updates keep their inputs in BF16 whatever `save` says; gradient
            checkpointing around the layer keeps nothing.

    Returns: (T, H), the dtype of x or, under autocast, autocast's.

    Raises: ValueError naming the argument, what was expected and what came. On the GPU a wrong id
        is found on the device, treated as dropped, and raised by a later operator or
        `fp8moe.check_errors`.

    Source: the module's docstring.
    """
    check_frozen_config(config)
    check_tokens(x, topk_ids, topk_weights, config)
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    _check_weight("w2", w2, ("E", x.shape[1], "I"), x.device)
    e, _, inner = w2.data.shape
    _check_weight("w13", w13, (e, 2 * inner, x.shape[1]), x.device)
    for name, w_t, shape in (("w13_t", w13_t, w13.data.mT.shape), ("w2_t", w2_t, w2.data.mT.shape)):
        if w_t is not None:
            _check_weight(name, w_t, tuple(shape), x.device)
    _check_low_rank("low_rank13", low_rank13, w13)
    _check_low_rank("low_rank2", low_rank2, w2)

    dtype = result_dtype(x)
    if x.shape[0] == 0:
        factors = [t for low in (low_rank13, low_rank2) if low is not None for t in low[:2]]
        return NoRows.apply(tuple(x.shape), dtype, x, topk_weights, *factors)
    with autocast_off(x.device):
        rows, slots, ends, _ = Permutation.of(topk_ids, e)

        def linear(
            x: Tensor,
            w: FP8Tensor,
            w_t: FP8Tensor | None,
            low_rank: LowRank | None,
            kinds: tuple[str, str, str],
        ) -> Tensor:
            transpose = (None, None) if w_t is None else w_t
            y = FrozenLinear.apply(x, *w, *transpose, ends, config, kinds, rows)
            return y if low_rank is None else y + _low_rank(x, low_rank, ends, rows)

        def activation(x: Tensor, topk_weights: Tensor) -> Tensor:
            xp = PermuteRows.apply(x, rows, slots)
            h = linear(xp, w13, w13_t, low_rank13, ("x", "w13", "dh"))
            return RoundedSwiglu.apply(h, topk_weights, rows, slots, config)

        x, topk_weights = x.bfloat16(), topk_weights.float()
        if config.save == "recompute" and torch.is_grad_enabled():
            # Dropout must repeat itself.
            keep_rng = low_rank13 is not None and low_rank13.dropout > 0
            a = checkpoint(
                activation, x, topk_weights, use_reentrant=False, preserve_rng_state=keep_rng
            )
        else:
            a = activation(x, topk_weights)
        y = linear(a, w2, w2_t, low_rank2, ("act", "w2", "dy"))
        return GatherSum.apply(y, rows, slots).to(dtype)
