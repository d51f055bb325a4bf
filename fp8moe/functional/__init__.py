"""grouped_linear and swiglu_experts: expert layers whose fprop, dgrad and wgrad run in FP8.

One expert's linear layer is y = x w^T, with x (m, K), w (N, K), y (m, N). Its three GEMMs are

    fprop   y  = x  w^T      sum over K     x rows,       w rows
    dgrad   dx = dy w        sum over N     dy rows,      w columns
    wgrad   dw = dy^T x      sum over m     dy columns,   x columns

FP8 tensor cores read both operands along the summed dimension, and so do the scales, 128 elements
each. x and dy are therefore cast twice, along their rows (per_token, 1x128) for fprop and dgrad and
along tokens for wgrad: dy with a scale per channel (per_channel, 128x1), x with one for 128
channels (128x128). w has 128x128 scales, which serve both directions, so its transpose is a
transpose of bytes. In each GEMM the second operand is the one with 128x128 scales.

The SwiGLU expert layer, for token t with experts e = topk_ids[t, k] and weights p = topk_weights:

    h = x w13^T = [g | u]      a = silu(g) * u      y[t] = sum_k (p a) w2^T

The routing weight p multiplies the activation and not the output. Then the combine is a plain sum,
y is not needed in backward, dy is the same for all K rows of a token, and with da' = dy w2

    dp = <da', a>     dg = p da' u s (1 + g (1 - s)), s = sigmoid(g)     du = p da' silu(g)
    dw2 = dy^T (p a)      dw13 = [dg | du]^T x      dx[t] = sum_k [dg | du] w13

A 1x128 scale belongs to one token, so x and dy are cast while they are copied to expert order, each
token once. Everything between two GEMMs is one pass over memory:

    forward   route; cast + permute x -> h -> SwiGLU * p + casts -> y rows -> sum
    backward  cast + permute dy (rows and columns) -> da' -> SwiGLU' + all casts
              -> dw2 -> dx rows -> sum; cast + permute x to columns -> dw13
                                        (with many experts a token: cast x, then permute)

Backward needs h and x. h is kept as `FP8Config.save` says; x is the caller's own tensor, alive
anyway, and is cast a second time. With save="fp8" neither h nor da' ever exists in BF16: SwiGLU,
its backward pass and the casts are epilogues of the GEMMs.

With a GEMM in BF16, H or I not a multiple of 128, or another gate than SwiGLU, the layer is
composed of the functions in unfused.py and of `grouped_linear`: the same mathematics, more passes.

expert_parallel.py is the same layer with its experts spread over the ranks of a process group.

Nothing else here reads a count on the host. A parameter that carries an FP32 `main_grad` gets its
wgrad added there by the GEMM itself; then its autograd gradient is None and
`grad_added_to_main_grad` is set.

Sources: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3, for scales and accumulation;
Megatron-LM for folding p into the activation and for `main_grad`.
"""

from fp8moe.functional.experts import gated_experts, swiglu_experts
from fp8moe.functional.frozen import LowRank, frozen_swiglu_experts
from fp8moe.functional.linear import grouped_linear
from fp8moe.functional.observe import observe_fp8
from fp8moe.functional.weight_cache import (
    WeightCacheInfo,
    clear_weight_cache,
    weight_cache_info,
)

__all__ = [
    "LowRank",
    "WeightCacheInfo",
    "clear_weight_cache",
    "frozen_swiglu_experts",
    "gated_experts",
    "grouped_linear",
    "observe_fp8",
    "swiglu_experts",
    "weight_cache_info",
]
