"""swiglu_experts with the experts spread over the ranks of a process group.

    forward   cast x -> send FP8 -> experts -> send BF16 back -> sum over k
    backward  cast dy -> send FP8 -> experts' backward -> send dx (BF16) and dp (FP32) back -> sum

x and dy are cast once per token before they travel, with the same scales as in one process, and
nothing is dequantized on arrival. dx travels back while the weight gradients are computed.

`dispatch` and `expert_parallel_swiglu` are two calls so that other work, a shared expert for one,
can be put between them, while the tokens travel.

A GEMM in BF16, or H or I not a multiple of 128: x and dy travel in BF16 (see unfused.py).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import check_size, check_tokens, check_weights
from fp8moe.functional.autocast import autocast_off, result_dtype
from fp8moe.functional.exchange import Combine, Exchange, Message
from fp8moe.functional.experts import backward_rows, forward_rows, unfused_rows
from fp8moe.functional.sharded import local_weight
from fp8moe.functional.tokens import Tokens
from fp8moe.kernels.fp8tensor import BLOCK
from fp8moe.kernels.gemm import sparing_sms
from fp8moe.kernels.permute import gather_slots, permute_rows

Tensor = torch.Tensor

SPARED_SMS = 0
"""SMs that the weight gradients leave to NCCL while dx travels."""


class Dispatched:
    """Tokens on their way to their experts: what `dispatch` returns.

    Attributes:
        exchange: the plan; its Splits tell the bytes on the wire.
        fused: whether x travels in FP8, for the fused path; else in BF16.
    """

    def __init__(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        exchange: Exchange,
        config: FP8Config,
        fused: bool,
    ) -> None:
        self.exchange, self.config, self.fused = exchange, config, fused
        self.shape, self.topk = tuple(x.shape), topk_ids.shape[1]
        x, weights = x.detach(), topk_weights.detach().float()
        # Packed before the host knows how much to send, sent as soon as it does.
        if fused:
            message = Message(exchange, x, config.pow2_scales, topk_ids, weights)
        else:
            message = Message(exchange, x.bfloat16(), None, topk_ids, weights)
        exchange.settle()
        self._message: Message | None = message.start()

    def wait(self) -> tuple[Tokens, Tensor]:
        """The received tokens, in FP8 or BF16, and their weights (R, K) float32."""
        if self._message is None:
            raise RuntimeError(
                "dispatched: expected tokens on their way, got some that were used before; every "
                "forward, a recomputed one too, needs a dispatch of its own"
            )
        message, self._message = self._message, None
        data, scale, routing = message.wait()
        assert routing is not None
        return Tokens(data, scale), self.exchange.receive(routing)


class ExpertParallelSwiglu(torch.autograd.Function):
    """The fused path over a group. Arguments as of SwigluExperts, and the tokens on their way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_ids: None,
        topk_weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        config: FP8Config,
        dtype: torch.dtype,
        grad: bool,
        dispatched: Dispatched,
    ) -> Tensor:
        tokens, weights = dispatched.wait()
        exchange = ctx.exchange = dispatched.exchange
        p = exchange.permutation
        rows = forward_rows(ctx, tokens, weights, p, w13, w2, config, grad)
        ctx.x_dtype = x.dtype
        return exchange.return_rows(rows).wait().to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        exchange: Exchange = ctx.exchange

        def take_slots(partials: Tensor, row_of_slot: Tensor) -> Any:
            return exchange.return_slots(
                gather_slots(partials, exchange.row_of_received.unsqueeze(1))
            )

        travelling = contextlib.ExitStack()

        def sum_rows(rows: Tensor, row_of_slot: Tensor) -> Any:
            returned = exchange.return_rows(rows)
            travelling.enter_context(sparing_sms(SPARED_SMS))
            return returned

        with autocast_off(dy.device), travelling:
            message = Message(exchange, dy.contiguous(), ctx.config.pow2_scales).start()

            def take_dy() -> Tokens:
                return Tokens(*message.wait()[:2])

            dx, dp, dw13, dw2 = backward_rows(ctx, take_dy, sum_rows, take_slots)
            dp = None if dp is None else dp.wait()
            dx = None if dx is None else dx.wait().to(ctx.x_dtype)
        return dx, None, dp, dw13, dw2, None, None, None, None


class DispatchRows(torch.autograd.Function):
    """x_R[r] = x of the token whose slot row r holds; the gradient is the sum over its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.dtype = exchange, x.dtype
        return permute_rows(received, *exchange.permutation[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Any:
        return ctx.exchange.return_rows(dx.contiguous()).wait().to(ctx.dtype), None, None


class DispatchWeights(torch.autograd.Function):
    """The received routing weights; the gradient goes back to the slots that they came from."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, received: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return received.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> Any:
        exchange = ctx.exchange
        slots = exchange.permutation.slot_of_row.index_select(0, exchange.row_of_received)
        return exchange.return_slots(dp.flatten().index_select(0, slots)).wait(), None, None


class CombineRows(torch.autograd.Function):
    """y[t] = sum_k y_R[row of slot (t, k)]; the gradient is sent to each of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.return_rows(rows).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        exchange = ctx.exchange
        received = Message(exchange, dy.contiguous(), None).start().wait()
        return permute_rows(received.data, *exchange.permutation[:2]), None


@torch.compiler.disable
def dispatch(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    intermediate_size: int,
    *,
    config: FP8Config,
    group: dist.ProcessGroup,
    combine: Combine = "rows",
) -> Dispatched:
    """Start sending each token to the ranks of `group` that hold its experts.

    All ranks call this together, also with no tokens of their own. It reads the message sizes on
    the host once; the tokens then travel while the device does other work.

    Args:
        x: (T, H) BF16, FP16 or FP32; T may differ between ranks, H may not.
        topk_ids: (T, K) int32 or int64, 0 to num_experts, which drops the slot.
        topk_weights: (T, K), used in FP32.
        num_experts: E of all ranks together, a multiple of the size of group.
        intermediate_size: I, which decides with H whether the fused path can run.
        config: the same on all ranks.
        combine: "sums" or "rows", see `fp8moe.functional.exchange.Combine`.

    Raises: ValueError naming the argument; for an id out of range, on every rank alike.
    """
    check_tokens(x, topk_ids, topk_weights, config)
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    check_size("intermediate_size", intermediate_size, config)
    if num_experts % group.size():
        raise ValueError(
            f"num_experts: expected a multiple of the {group.size()} ranks of the group, "
            f"got {num_experts}"
        )
    fused = config.all_fp8 and x.shape[1] % BLOCK == 0 and intermediate_size % BLOCK == 0
    alike = {"H": x.shape[1], "FP8": int(fused), "pow2_scales": int(config.pow2_scales)}
    exchange = Exchange.plan(topk_ids, num_experts, group, combine, **alike)
    return Dispatched(x, topk_ids, topk_weights, exchange, config, fused)


@torch.compiler.disable
def expert_parallel_swiglu(
    dispatched: Dispatched, x: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor
) -> Tensor:
    """y[t] = sum_k p[t, k] (silu(g) * u) w2[e]^T, as `swiglu_experts`, for tokens on their way.

    Differentiable in x, topk_weights, w13 and w2; the gradients of the weights are the sums over
    the tokens of all ranks. Every rank of the group must run backward, with the same inputs
    requiring gradients; one without tokens through its empty y.

    Args:
        dispatched: from `dispatch`; used once.
        x, topk_weights: what `dispatch` was given. Their values have left already: here they only
            tell where gradients go.
        w13: (E / ranks, 2I, H), this rank's experts, or a DTensor of which they are the local part.
        w2: (E / ranks, H, I), likewise.

    Returns: (T, H), the dtype of x or, under autocast, autocast's.

    Raises: ValueError naming the argument, what was expected and what came; RuntimeError for
        tokens that were used before.
    """
    config, exchange = dispatched.config, dispatched.exchange
    if tuple(x.shape) != dispatched.shape:
        raise ValueError(f"x: expected {dispatched.shape} as dispatched, got {tuple(x.shape)}")
    expected = (dispatched.shape[0], dispatched.topk)
    if tuple(topk_weights.shape) != expected:
        raise ValueError(
            f"topk_weights: expected {expected} as dispatched, got {tuple(topk_weights.shape)}"
        )
    w13, w2 = local_weight(w13), local_weight(w2)
    check_weights(x, w13, w2, config)
    if w13.shape[0] != exchange.num_local_experts:
        raise ValueError(f"w13: expected {exchange.num_local_experts} experts, got {w13.shape[0]}")
    weights, dtype, grad = topk_weights.float(), result_dtype(x), torch.is_grad_enabled()
    with autocast_off(x.device):
        if dispatched.fused:
            return ExpertParallelSwiglu.apply(
                x, None, weights, w13, w2, config, dtype, grad, dispatched
            )
        received, received_weights = dispatched.wait()
        xp = DispatchRows.apply(x, received.data, exchange)
        p = DispatchWeights.apply(weights, received_weights, exchange)
        y = unfused_rows(lambda rows: rows, xp, p, exchange.permutation, w13, w2, config, grad)
        return CombineRows.apply(y, exchange).to(dtype)
