"""SwiGLU and its backward pass against FP64 autograd; the casts behind them bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from fp8moe import quant, testing
from fp8moe.kernels import reference

TOKENS, TOPK, EXPERTS = 90, 2, 3


def inputs(width: int) -> tuple[torch.Tensor, ...]:
    """h (Rcap, 2I), da (Rcap, I), topk_weights, slot_of_row; NaN in every row without a slot."""
    ids, weights = testing.random_topk(TOKENS, TOPK, EXPERTS, seed=0, dropped=0.1)
    _, slot_of_row, _, _ = reference.route(ids, EXPERTS)
    rows = len(slot_of_row)
    h, da = torch.randn(rows, 2 * width).bfloat16(), torch.randn(rows, width).bfloat16()
    h[:, ::7] *= 20
    for t in (h, da):
        t[slot_of_row < 0] = torch.nan
    return h, da, weights, slot_of_row


def exact(h, da, weights, slot_of_row):
    """aw, dh and dprob of the rows with a slot, FP64 autograd."""
    live = slot_of_row >= 0
    x = h[live].double().requires_grad_()
    p = weights.double().flatten()[slot_of_row[live].long()].requires_grad_()
    g, u = x.chunk(2, dim=1)
    aw = p[:, None] * torch.nn.functional.silu(g) * u
    dh, dprob = torch.autograd.grad(aw, (x, p), da[live].double())
    return live, aw.detach(), dh, dprob


def close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Each element within the rounding to bf16, 2**-8, and a little for cancellation in FP32."""
    return torch.allclose(out.double(), expected, rtol=4e-3, atol=2e-5)


@pytest.mark.parametrize("width", [128, 200])
def test_values_and_gradients(width: int) -> None:
    h, da, weights, slot_of_row = inputs(width)
    live, aw, dh, dprob = exact(h, da, weights, slot_of_row)
    got = reference.swiglu_rows(h, weights, slot_of_row)
    assert got.dtype == torch.bfloat16 and not got[~live].any()
    assert close(got[live], aw)

    got_dh, got_aw, partial = reference.swiglu_backward_rows(h, da, weights, slot_of_row)
    assert torch.equal(got_aw, got)
    assert got_dh.dtype == torch.bfloat16 and not got_dh[~live].any()
    assert partial.shape == (-(-width // 128), len(h)) and not partial[:, ~live].any()
    assert close(got_dh[live], dh)
    assert torch.allclose(partial.double().sum(0)[live], dprob, rtol=1e-4, atol=1e-3)

    # Negative controls: gate and up exchanged, and a routing weight that is off.
    swapped = torch.cat([h[:, width:], h[:, :width]], dim=1)
    assert not close(reference.swiglu_rows(swapped, weights, slot_of_row)[live], aw)
    assert not close(reference.swiglu_rows(h, weights * 1.005, slot_of_row)[live], aw)


@pytest.mark.parametrize("gate", [-1e4, -100.0, -88.5, 0.0, 88.5, 1e4])
def test_saturated_gates_stay_finite(gate: float) -> None:
    h = torch.tensor([[gate, 3.0]]).bfloat16()
    da, weights, slot = torch.ones(1, 1).bfloat16(), torch.ones(1, 1), torch.zeros(1).int()
    aw = reference.swiglu_rows(h, weights, slot)
    dh, _, partial = reference.swiglu_backward_rows(h, da, weights, slot)
    x = h.double().requires_grad_()
    expected = torch.nn.functional.silu(x[:, :1]) * x[:, 1:]
    expected.sum().backward()
    assert torch.allclose(aw.double(), expected, rtol=4e-3, atol=1e-30)
    assert x.grad is not None
    assert torch.allclose(dh.double(), x.grad, rtol=4e-3, atol=1e-30)
    assert torch.allclose(partial.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("width", [128, 384])
def test_casts_are_the_casts_of_the_rows(width: int, pow2: bool) -> None:
    h, da, weights, slot_of_row = inputs(width)
    used = int((slot_of_row != -2).sum())
    ends = torch.tensor([used], dtype=torch.int32)
    dh, aw, partial = reference.swiglu_backward_rows(h, da, weights, slot_of_row)

    forward = quant.FP8Tensor(*reference.swiglu_cast(h, weights, slot_of_row, pow2))
    out = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, pow2)
    for got, expected in (
        (forward, quant.per_token(aw, pow2=pow2)),
        (out[0:2], quant.per_token(dh, pow2=pow2)),
    ):
        assert got[0].shape == expected.data.shape and got[1].stride() == expected.scale.stride()
        assert torch.equal(got[0].view(torch.uint8)[:used], expected.data.view(torch.uint8)[:used])
        assert torch.equal(got[1][:used], expected.scale[:used])
    for got, expected in (
        (out[2:4], quant.per_channel(dh[:used], ends, pow2=pow2)),
        (out[4:6], quant.per_block(aw[:used].t().contiguous(), pow2=pow2)),
    ):
        assert got[0].shape == (expected.data.shape[0], len(h))
        assert testing.same_bits(got[0][:, :used], expected.data[:, :used])
        assert testing.same_bits(got[1][:, : used // 128], expected.scale[:, : used // 128])
    assert out[3].stride(0) == 1 and out[5].is_contiguous()
    assert out[5].shape == (width // 128, len(h) // 128)
    assert torch.equal(out[6][:, :used], partial[:, :used])


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("width", [128, 200])
def test_a_block_of_the_activation_has_the_scale_of_its_maximum(width: int, pow2: bool) -> None:
    h, da, weights, slot_of_row = inputs(width)
    h[128:256, :width] = 0  # silu(0) = 0: a row block of zeros
    _, aw, _ = reference.swiglu_backward_rows(h, da, weights, slot_of_row)
    data, scale = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, pow2)[4:6]
    used = int((slot_of_row != -2).sum())
    for c in range(-(-width // 128)):
        for r in range(used // 128):
            at = slice(128 * c, 128 * c + 128), slice(128 * r, 128 * r + 128)
            block = aw.t()[at].float()
            quotient = max(block.abs().max().item(), 2.0**-48) / 448
            exact = 2.0 ** math.ceil(math.log2(quotient)) if pow2 else quotient
            assert scale[c, r].item() == pytest.approx(exact, rel=2**-23)
            step = 2.0**-4 * block.abs() + 2.0**-10 * scale[c, r]  # half a step of E4M3
            error = (data[at].float() * scale[c, r] - block).abs()
            assert (error <= step * (1 + 2**-20)).all()
            # Negative control: a maximum that is one step of BF16 off.
            if r != 1:
                assert scale[c, r].item() != pytest.approx(exact * (1 + 2**-7), rel=2**-23)
    zeros = data[:, 128:256].view(torch.uint8) & 0x7F
    assert not zeros.any() and (scale[:, 1] <= 2.0**-56).all()
    pad = (slot_of_row == -1).nonzero().squeeze(1)
    assert len(pad) and not (data.view(torch.uint8)[:, pad] & 0x7F).any()


def test_the_activation_does_not_depend_on_da() -> None:
    h, da, weights, slot_of_row = inputs(256)
    used = int((slot_of_row != -2).sum())
    given = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, True)
    zeros = reference.swiglu_backward_cast(h, None, da * 0, weights, slot_of_row, True)
    assert testing.same_bits(given[4][:, :used], zeros[4][:, :used])
    assert testing.same_bits(given[5][:, : used // 128], zeros[5][:, : used // 128])
    assert not (zeros[2].view(torch.uint8)[:, :used] & 0x7F).any()


@pytest.mark.parametrize("pow2", [False, True])
def test_h_in_fp8(pow2: bool) -> None:
    h, da, weights, slot_of_row = inputs(256)
    used = int((slot_of_row != -2).sum())
    data, scale, *h8 = reference.swiglu_cast_both(h, weights, slot_of_row, pow2)
    alone = reference.swiglu_cast(h, weights, slot_of_row, pow2)
    assert testing.same_bits(data[:used], alone[0][:used])
    assert testing.same_bits(scale[:used], alone[1][:used])
    zeroed = h.masked_fill((slot_of_row < 0)[:, None], 0.0)
    for got, expected in zip(h8, reference.cast_per_token(zeroed, pow2), strict=True):
        assert testing.same_bits(got[:used], expected[:used])

    # Backward from FP8 is backward from the values that FP8 stands for.
    out = reference.swiglu_backward_cast(*h8, da, weights, slot_of_row, pow2)
    values = quant.dequantize(quant.FP8Tensor(*h8))
    expected = reference.swiglu_backward_cast(values, None, da, weights, slot_of_row, pow2)
    rounded = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, pow2)
    for at, (got, wanted) in enumerate(zip(out, expected, strict=True)):
        columns = got.shape[1] if at < 2 else used // 128 if at in (3, 5) else used
        rows = used if at < 2 else got.shape[0]
        assert testing.same_bits(got[:rows, :columns], wanted[:rows, :columns]), at
    assert not testing.same_bits(out[0][:used], rounded[0][:used])


def test_rows_are_independent_of_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8moe.kernels.reference import cast

    h, da, weights, slot_of_row = inputs(128)
    used = int((slot_of_row != -2).sum())
    whole = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, True)
    monkeypatch.setattr(cast, "CHUNK_ELEMENTS", 1)
    pieces = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, True)
    for i, (a, b) in enumerate(zip(whole, pieces, strict=True)):
        if a.element_size() == 1:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        if i < 2:
            assert torch.equal(a[:used], b[:used])
        else:
            columns = used // 128 if i in (3, 5) else used
            assert torch.equal(a[:, :columns], b[:, :columns])


def test_a_non_finite_gradient_stays_visible() -> None:
    h, da, weights, slot_of_row = inputs(128)
    row = int((slot_of_row >= 0).nonzero()[3])
    da[row, 5] = torch.inf
    out = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, True)
    assert out[1][row].isnan().all()
    assert out[3][[5, 133], row // 128].isnan().all()
    assert not out[6][:, row].isfinite().all()
    assert not out[5][:, row // 128].isnan().any()

    h[row, 133] = torch.nan  # of the up projection: its block of the activation, and no other
    data, scale = reference.swiglu_backward_cast(h, None, da, weights, slot_of_row, True)[4:6]
    used = int((slot_of_row != -2).sum())
    assert scale[:, : used // 128].isnan().nonzero().tolist() == [[0, row // 128]]
    nan = data.view(torch.uint8)[:, :used] == 0x7F
    assert nan.sum() == 128 * 128 and nan[:, row // 128 * 128 :][:, :128].all()
