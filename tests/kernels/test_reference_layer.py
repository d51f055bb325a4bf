"""The reference ops chained into an expert layer, forward and backward, against FP64 autograd."""

from __future__ import annotations

import pytest
import torch

from fp8moe import testing
from fp8moe.kernels import reference as ops

# What FP8 arithmetic leaves on Gaussian data (simulated: 23.7, 23.5, 23.7, 23.4, 23.8), less 1 dB.
GATES_DB = {"y": 22.7, "dx": 22.5, "dw2": 22.7, "dw13": 22.4, "dprob": 22.8}


def exact_layer(x, ids, weights, w13, w2, dy) -> dict[str, torch.Tensor]:
    x, weights, w13, w2 = (t.double().requires_grad_() for t in (x, weights, w13, w2))
    y = torch.zeros_like(x)
    for expert in range(w13.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        g, u = (x[token] @ w13[expert].t()).chunk(2, dim=1)
        rows = (torch.nn.functional.silu(g) * u) @ w2[expert].t()
        y = y.index_add(0, token, weights[token, slot, None] * rows)
    dx, dprob, dw13, dw2 = torch.autograd.grad(y, (x, weights, w13, w2), dy.double())
    return {"y": y.detach(), "dx": dx, "dw2": dw2, "dw13": dw13, "dprob": dprob}


def fp8_layer(x, ids, weights, w13, w2, dy, pow2: bool) -> dict[str, torch.Tensor]:
    topk, (experts, hidden, inter) = ids.shape[1], w2.shape
    row_of_slot, slot_of_row, ends, _ = ops.route(ids, experts)
    rows = len(slot_of_row)

    def empty(width: int) -> torch.Tensor:
        return testing.poison(torch.empty(rows, width, dtype=torch.bfloat16))

    x8 = ops.cast_per_token(x, pow2)
    w13_8, w13_scale, w13_t, w13_t_scale = ops.cast_per_block_both(w13, pow2)
    w2_8, w2_scale, w2_t, w2_t_scale = ops.cast_per_block_both(w2, pow2)
    h, y_rows, da, dx_rows = empty(2 * inter), empty(hidden), empty(inter), empty(hidden)
    ops.m_grouped_gemm_nt(
        *ops.permute_fp8(*x8, row_of_slot, slot_of_row), w13_8, w13_scale, ends, h
    )
    act = ops.swiglu_cast(h, weights, slot_of_row, pow2)
    ops.m_grouped_gemm_nt(*act, w2_8, w2_scale, ends, y_rows)

    dy8 = ops.cast_per_token(dy, pow2)
    dyp, dyp_scale, dyt, dyt_scale = ops.permute_fp8_both(*dy8, slot_of_row, topk, pow2)
    ops.m_grouped_gemm_nt(dyp, dyp_scale, w2_t, w2_t_scale, ends, da)
    dh, dh_scale, dht, dht_scale, awt, awt_scale, partial = ops.swiglu_backward_cast(
        h, None, da, weights, slot_of_row, pow2
    )
    dw2, dw13 = torch.empty(w2.shape), torch.empty(w13.shape)
    ops.k_grouped_gemm(dyt, dyt_scale, awt, awt_scale, ends, dw2, False)
    ops.m_grouped_gemm_nt(dh, dh_scale, w13_t, w13_t_scale, ends, dx_rows)
    xt = ops.permute_fp8_to_channel(*x8, slot_of_row, topk, pow2, True)
    ops.k_grouped_gemm(dht, dht_scale, *xt, ends, dw13, False)
    return {
        "y": ops.gather_sum(y_rows, row_of_slot),
        "dx": ops.gather_sum(dx_rows, row_of_slot),
        "dw2": dw2,
        "dw13": dw13,
        "dprob": ops.gather_slots(partial, row_of_slot),
    }


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "zipf", "one_hot"])
def test_layer(kind: str, pow2: bool) -> None:
    tokens, topk, experts, hidden, inter = 160, 2, 4, 256, 128
    ids, weights = testing.random_topk(tokens, topk, experts, seed=0, kind=kind, dropped=0.1)
    x, dy = torch.randn(tokens, hidden).bfloat16(), torch.randn(tokens, hidden).bfloat16()
    w13 = (torch.randn(experts, 2 * inter, hidden) * hidden**-0.5).bfloat16()
    w2 = (torch.randn(experts, hidden, inter) * inter**-0.5).bfloat16()
    expected = exact_layer(x, ids, weights, w13, w2, dy)
    got = fp8_layer(x, ids, weights, w13, w2, dy, pow2)
    for name, gate in GATES_DB.items():
        assert got[name].shape == expected[name].shape
        db = testing.sqnr_db(got[name], expected[name])
        # Casting x and dy twice is what FP32 scales cost; powers of two avoid it.
        assert db > (gate if pow2 else gate - 0.5), f"{name}: {db:.1f} dB"

    again = fp8_layer(x, ids, weights, w13, w2, dy, pow2)
    for name in GATES_DB:
        assert torch.equal(got[name], again[name])

    # Negative control: routing weights in the wrong slots.
    wrong = fp8_layer(x, ids, weights.flip(1), w13, w2, dy, pow2)
    for name in ("y", "dx", "dw2", "dw13"):
        assert testing.sqnr_db(wrong[name], expected[name]) < GATES_DB[name]
