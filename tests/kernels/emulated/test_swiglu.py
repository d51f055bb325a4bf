"""SwiGLU and its backward pass on the CPU, see test_emulated.py."""

from __future__ import annotations

import math

import pytest
import torch

from fp8moe.kernels import reference, swiglu

from .conftest import plant
from .test_emulated import Start, assert_same, routed, used_rows


@pytest.mark.parametrize("h_fp8", [False, True], ids=["h bf16", "h fp8"])
@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
def test_swiglu(emulated: Start, pow2: bool, h_fp8: bool) -> None:
    """The rounded values are within one bf16 step of the reference, their casts the same bits."""
    _, weights, _, slot_of_row, _, _ = routed(70, 2, 3, 0.1)
    capacity, width = len(slot_of_row), 256
    used = used_rows(slot_of_row)
    h, da = torch.randn(capacity, 2 * width).bfloat16(), torch.randn(capacity, width).bfloat16()
    h[slot_of_row < 0] = math.nan  # padding may hold anything
    da[slot_of_row < 0] = math.nan
    emulated(swiglu)
    aw = torch.empty(capacity, width, dtype=torch.bfloat16)
    out = swiglu._both_fake(h, weights, slot_of_row, pow2)
    data, scale, *h8 = out
    swiglu._launch_forward(h, weights, slot_of_row, pow2, out[:2], out[2:] if h_fp8 else None, aw)
    expected_aw = reference.swiglu_rows(h, weights, slot_of_row)
    torch.testing.assert_close(aw[:used], expected_aw[:used], rtol=2**-7, atol=1e-6)
    for actual, wanted in zip((data, scale), reference.cast_per_token(aw, pow2), strict=True):
        assert_same(actual[:used], wanted[:used])
    h_scale = None
    if h_fp8:
        wanted_h8 = reference.swiglu_cast_both(h, weights, slot_of_row, pow2)[2:]
        for actual, wanted in zip(h8, wanted_h8, strict=True):
            assert_same(actual[:used], wanted[:used])
        h, h_scale = h8
        h_scale[slot_of_row < 0] = math.nan  # padding may hold anything here too

    dh = torch.empty(capacity, 2 * width, dtype=torch.bfloat16)
    outs = swiglu._launch_backward(h, h_scale, da, weights, slot_of_row, pow2, dh, aw)
    values = h if h_scale is None else reference.dequantize_per_token(h, h_scale)
    dh_wanted, aw_wanted, dprob = reference.swiglu_backward_rows(values, da, weights, slot_of_row)
    torch.testing.assert_close(dh[:used], dh_wanted[:used], rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(aw[:used], aw_wanted[:used], rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(outs[6][:, :used], dprob[:, :used], rtol=1e-4, atol=1e-4)
    assert_backward_casts(outs, dh[:used], aw[:used], pow2)


def assert_backward_casts(
    outs: swiglu.Backward, dh: torch.Tensor, aw: torch.Tensor, pow2: bool
) -> None:
    """The outputs are the casts of dh and aw, the rounded values of all used rows."""
    used = len(dh)
    whole = torch.tensor([used], dtype=torch.int32)
    for actual, wanted in zip(outs[:2], reference.cast_per_token(dh, pow2), strict=True):
        assert_same(actual[:used], wanted)
    channels = reference.cast_per_channel(dh, whole, pow2, False)
    blocks = (t[0] for t in reference.cast_per_block(aw.t().unsqueeze(0), pow2))
    for (data_t, scale_t), (wanted_t, wanted_scale) in (
        (outs[2:4], channels),
        (outs[4:6], blocks),
    ):
        assert_same(data_t[:, :used], wanted_t[:, :used])
        assert_same(scale_t[:, : used // 128], wanted_scale[:, : used // 128])


@pytest.mark.parametrize("h_fp8", [False, True], ids=["h bf16", "h fp8"])
@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
def test_swiglu_of_blocks_unlike_each_other(emulated: Start, pow2: bool, h_fp8: bool) -> None:
    """Zeros, NaN, Inf, an outlier in each corner; da of zeros, as where only dw2 is asked for."""
    _, weights, _, slot_of_row, _, _ = routed(300, 2, 4, 0.1)
    used = used_rows(slot_of_row)
    rows = (slot_of_row >= 0).nonzero().squeeze(1).tolist()
    h = torch.randn(len(slot_of_row), 512).bfloat16()
    da = torch.zeros(len(slot_of_row), 256, dtype=torch.bfloat16)
    h[128:256, 128:256] = 0  # a gate of zeros: block (1, 1) of the activation
    h[rows[0], [0, 256]] = 60.0  # the first thread's first element, and the last's last
    last = max(r for r in rows if r < 128)
    h[last, [255, 511]] = 90.0
    h[max(r for r in rows if r < 384), 300] = math.nan
    h[max(r for r in rows if r < 512), 400] = math.inf
    for t in (h, da):
        t[slot_of_row < 0] = math.nan
    h_scale = None
    if h_fp8:
        h, h_scale = reference.swiglu_cast_both(h, weights, slot_of_row, pow2)[2:]
        h_scale[slot_of_row < 0] = math.nan
    emulated(swiglu)
    dh = torch.empty(len(slot_of_row), 512, dtype=torch.bfloat16)
    aw = torch.empty(len(slot_of_row), 256, dtype=torch.bfloat16)
    outs = swiglu._launch_backward(h, h_scale, da, weights, slot_of_row, pow2, dh, aw)
    assert used >= 512 and not aw[:used][slot_of_row[:used] < 0].any()
    assert_backward_casts(outs, dh[:used], aw[:used], pow2)
    scale = outs[5][:, : used // 128]
    assert scale.isnan().nonzero().tolist() == [[0, 2], [1, 3]]
    assert (scale <= 2.0**-56).nonzero().tolist() == [[1, 1]]
    peak = aw[:128].float().abs()
    assert peak[:, :128].argmax() == rows[0] * 128 and peak[:, 128:].argmax() == last * 128 + 127


# -------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("kind == 1 ? gate_scale + row", "kind == 1 ? up_scale + row"),
        ("weight_of_row(row_values, 16 + i)", "weight_of_row(row_values, 8 + i)"),
        ("slot < 0 ? 0.0f : __ldg(at)", "__ldg(at)"),
        ("(16 * (j & 1))", "(16 * (j & 2))"),
    ],
    ids=["gate", "up", "padding", "pair"],
)
def test_a_planted_error_in_swiglu_from_fp8_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    plant(monkeypatch, right, wrong)
    _, weights, _, slot_of_row, _, _ = routed(70, 2, 3, 0.1)
    capacity, used = len(slot_of_row), used_rows(slot_of_row)
    h = torch.randn(capacity, 256) * torch.randint(-3, 4, (capacity, 1)).exp2()
    h[:, :128] *= 8
    da = torch.randn(capacity, 128).bfloat16()
    *_, h8, h_scale = reference.swiglu_cast_both(h.bfloat16(), weights, slot_of_row, True)
    h_scale[slot_of_row < 0] = math.nan
    emulated(swiglu)
    dh = torch.empty(capacity, 256, dtype=torch.bfloat16)
    with pytest.raises((AssertionError, RuntimeError)):
        swiglu._launch_backward(h8, h_scale, da, weights, slot_of_row, True, dh, None)
        exact = reference.dequantize_per_token(h8, h_scale)
        wanted = reference.swiglu_backward_rows(exact, da, weights, slot_of_row)[0]
        torch.testing.assert_close(dh[:used], wanted[:used], rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("max_u16x2(aw_max, amax_bf16x2(aw", "max_u16x2(0u, amax_bf16x2(aw"),
        ("fold_max_16x2(aw_max)", "(aw_max & 0xFFFFu)"),
        ("if (lane == 0) results.aw_max", "if (threadIdx.x == 0) results.aw_max"),
        ("results.aw_max[lane % kWarps]", "results.aw_max[warp]"),
        ("block_scale<kPow2>(aw_max << 16)", "block_scale<kPow2>(aw_max << 15)"),
        ("(capacity / kTileRows) + row_block", "(columns / kTileRows) + row_block"),
        ("load_columns(tile, kDown, warp)", "load_columns(tile, kDown, warp ^ 1)"),
    ],
    ids=["row", "pair", "warp", "block", "scale", "address", "columns"],
)
def test_a_planted_error_in_the_blocks_of_the_activation_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    plant(monkeypatch, right, wrong)
    _, weights, _, slot_of_row, _, _ = routed(150, 2, 3, 0.1)
    capacity, used = len(slot_of_row), used_rows(slot_of_row)
    h = torch.randn(capacity, 512) * torch.randint(-3, 4, (capacity, 1)).exp2()
    h[5, [1, 257]] = 40.0  # the largest in a row that is not a thread's last, an odd column
    da = torch.randn(capacity, 256).bfloat16()
    emulated(swiglu)
    aw = torch.empty(capacity, 256, dtype=torch.bfloat16)
    with pytest.raises((AssertionError, RuntimeError)):
        outs = swiglu._launch_backward(h.bfloat16(), None, da, weights, slot_of_row, True, None, aw)
        wanted, wanted_scale = reference.cast_per_block(aw[:used].t().unsqueeze(0), True)
        assert_same(outs[4][:, :used], wanted[0])
        assert_same(outs[5][:, : used // 128], wanted_scale[0])
