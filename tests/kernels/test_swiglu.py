"""SwiGLU with its casts: the rounded values against FP64, the casts of those values bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8moe import testing
from fp8moe.kernels import reference, swiglu
from fp8moe.kernels.fp8tensor import AMAX_FLOOR, FP8_DTYPE, FP8Tensor, ceil_div, empty_scale
from fp8moe.kernels.reference.cast import cast_rows_per_channel

Tensors = tuple[torch.Tensor, ...]

pow2s = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])

# (T, K, E, I): one token, odd column blocks, empty experts, more row blocks than a panel.
SHAPES = [(1, 1, 1, 128), (70, 2, 3, 384), (60, 4, 20, 256), (700, 2, 9, 128)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

# Of a value, relative: one rounding to bf16, and the approximate exponential and reciprocal.
ROUNDING = 2.0**-8
# Of dg, relative to |p * da * u|: the two terms of the derivative of silu may cancel.
CANCELLATION = 2.0**-18


class Case:
    """Inputs of one shape: h and da are NaN in padding rows, which nothing may read."""

    def __init__(self, shape: tuple[int, ...], gain: float = 3.0) -> None:
        tokens, topk, experts, self.columns = shape
        ids = torch.randint(0, experts + 1, (tokens, topk))
        _, self.slots, _, _ = reference.route(ids, experts)
        self.used = int((self.slots != -2).sum())
        self.capacity = len(self.slots)
        self.h = (gain * torch.randn(self.capacity, 2 * self.columns)).bfloat16()
        self.da = torch.randn(self.capacity, self.columns).bfloat16()
        self.weights = torch.rand(tokens, topk)
        self.h[self.slots < 0] = float("nan")
        self.da[self.slots < 0] = float("inf")

    def in_fp8(self, pow2: bool) -> FP8Tensor:
        """h as swiglu_cast_both saves it; scales of padding rows NaN, which nothing may read."""
        h8 = FP8Tensor(*reference.swiglu_cast_both(self.h, self.weights, self.slots, pow2)[2:])
        h8.scale[self.slots < 0] = float("nan")
        return h8

    def exact(self, h8: FP8Tensor | None = None) -> Tensors:
        """dh, aw, dprob_partial and the scale of dg's cancelling terms in FP64, padding zero."""
        h = self.h.double() if h8 is None else testing.exact(h8)
        g, u = h.nan_to_num(0.0, 0.0, 0.0).chunk(2, dim=1)
        da = self.da.double().nan_to_num(0.0, 0.0, 0.0)
        p = self.weights.double().view(-1)[self.slots.clamp_min(0).long()][:, None]
        p[self.slots < 0] = 0
        s = torch.sigmoid(g)
        a = g * s * u
        dg = p * da * u * s * (1 + g * (1 - s))
        dh = torch.cat([dg, p * da * g * s], dim=1)
        terms = torch.cat([p * da * u, torch.zeros_like(u)], dim=1).abs()
        partial = (da * a).view(self.capacity, -1, 128).sum(2).t()
        sizes = (da * a).abs().view(self.capacity, -1, 128).sum(2).t()
        return dh, p * a, partial, sizes, terms

    def forward(self, device: torch.device, pow2: bool) -> Tensors:
        """data, scale and the rounded activation."""
        args = (self.h, self.weights, self.slots)
        rounded = reference.swiglu_rows(*args)
        if device.type == "cuda":
            args = tuple(t.to(device) for t in args)
            rounded = rounded.to(device).fill_(float("nan"))
            out = swiglu._forward_fake(*args, pow2)
            swiglu._launch_forward(*args, pow2, out, None, rounded)
            return (*out, rounded)
        return (*swiglu.swiglu_cast(*args, pow2), rounded)

    def backward(self, device: torch.device, pow2: bool, h8: FP8Tensor | None = None) -> Tensors:
        """The seven outputs, rounded dh and rounded aw."""
        rest = (self.da, self.weights, self.slots)
        h, scale = (self.h, None) if h8 is None else h8
        values = h if h8 is None else reference.dequantize_per_token(*h8)
        dh, aw, _ = reference.swiglu_backward_rows(values, *rest)
        args = (h, scale, *rest)
        if device.type == "cuda":
            args = tuple(t if t is None else t.to(device) for t in args)
            if scale is not None:  # the copy's strides are not those of the original
                args = (args[0], empty_scale(*scale.shape, device).copy_(scale), *args[2:])
            dh, aw = (t.to(device).fill_(float("nan")) for t in (dh, aw))
            return (*swiglu._launch_backward(*args, pow2, dh, aw), dh, aw)
        return (*swiglu.swiglu_backward_cast(*args, pow2), dh, aw)


def assert_close(
    name: str, got: torch.Tensor, exact: torch.Tensor, extra: torch.Tensor | float = 0.0
) -> None:
    """|got - exact| <= ROUNDING * |exact| + extra, element by element, down to 1e-35.

    Below that the sigmoid is subnormal, which the kernel flushes to zero.
    """
    error = (got.cpu().double() - exact).abs()
    bound = ROUNDING * exact.abs() + extra + 1e-35
    assert not error.isnan().any(), f"{name}: NaN"
    worst = int((error / bound).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: got {got.flatten()[worst]}, expected {exact.flatten()[worst]}"
    )


def assert_bits(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bytes or, for scales, equal values; NaN equal to NaN."""
    got = got.cpu()
    assert got.shape == expected.shape, name
    if got.dtype == FP8_DTYPE:
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name
    else:
        assert bool(((got == expected) | (got.isnan() & expected.isnan())).all()), name


def assert_per_token(name: str, rows: torch.Tensor, out: Tensors, pow2: bool) -> None:
    used = len(rows)
    data, scale = reference.cast_per_token(rows.cpu(), pow2)
    assert_bits(f"{name} data", out[0][:used], data)
    assert_bits(f"{name} scale", out[1][:used], scale)


def assert_per_channel(name: str, rows: torch.Tensor, out: Tensors, pow2: bool) -> None:
    used = len(rows)
    data, scale = cast_rows_per_channel(rows.cpu(), used, pow2)
    assert_bits(f"{name} data", out[0][:, :used], data)
    assert_bits(f"{name} scale", out[1][:, : used // 128], scale)


def assert_per_block_t(name: str, rows: torch.Tensor, out: Tensors, pow2: bool) -> None:
    used = len(rows)
    data, scale = reference.cast_per_block(rows.cpu().t().unsqueeze(0), pow2)
    assert out[1].is_contiguous(), f"{name} scale"
    assert_bits(f"{name} data", out[0][:, :used], data[0])
    assert_bits(f"{name} scale", out[1][:, : used // 128], scale[0])


def assert_casts(case: Case, out: Tensors, pow2: bool) -> None:
    """The casts of a backward pass are those of its rounded values."""
    dh, aw = out[7][: case.used], out[8][: case.used]
    assert_per_token("dh", dh, out[0:2], pow2)
    assert_per_channel("dh_t", dh, out[2:4], pow2)
    assert_per_block_t("aw_t", aw, out[4:6], pow2)


# ------------------------------------------------------------------------------------------- values


@shapes
@pow2s
def test_forward(device: torch.device, shape: tuple[int, ...], pow2: bool) -> None:
    case = Case(shape)
    data, scale, rounded = case.forward(device, pow2)
    used = case.used
    assert_close("aw", rounded[:used], case.exact()[1][:used])
    assert_per_token("aw", rounded[:used], (data, scale), pow2)
    assert scale.stride() == empty_scale(*scale.shape).stride()


@shapes
@pow2s
def test_backward(device: torch.device, shape: tuple[int, ...], pow2: bool) -> None:
    case = Case(shape)
    out = case.backward(device, pow2)
    used = case.used
    dh, aw, partial, sizes, terms = case.exact()
    assert_close("dh", out[7][:used], dh[:used], CANCELLATION * terms[:used])
    assert_close("aw", out[8][:used], aw[:used])
    assert_casts(case, out, pow2)
    error = (out[6][:, :used].cpu().double() - partial[:, :used]).abs()
    assert bool((error <= 1e-5 * sizes[:, :used]).all())


@shapes
@pow2s
def test_h_is_cast_along(device: torch.device, shape: tuple[int, ...], pow2: bool) -> None:
    case = Case(shape)
    args = tuple(t.to(device) for t in (case.h, case.weights, case.slots))
    out = swiglu.swiglu_cast_both(*args, pow2)
    for name, got, wanted in zip("as", out, swiglu.swiglu_cast(*args, pow2), strict=False):
        assert_bits(name, got[: case.used], wanted[: case.used].cpu())
    zeroed = case.h.masked_fill((case.slots < 0)[:, None], 0.0)
    assert_per_token("h", zeroed[: case.used], out[2:], pow2)
    assert out[3].stride() == empty_scale(*out[3].shape).stride()


@shapes
@pow2s
def test_backward_from_fp8(device: torch.device, shape: tuple[int, ...], pow2: bool) -> None:
    case = Case(shape)
    h8, used = case.in_fp8(pow2), case.used
    out = case.backward(device, pow2, h8)
    dh, aw, partial, sizes, terms = case.exact(h8)
    assert_close("dh", out[7][:used], dh[:used], CANCELLATION * terms[:used])
    assert_close("aw", out[8][:used], aw[:used])
    assert_casts(case, out, pow2)
    error = (out[6][:, :used].cpu().double() - partial[:, :used]).abs()
    assert bool((error <= 1e-5 * sizes[:, :used]).all())
    # Negative control: the scales of another row.
    h8.scale.copy_(h8.scale.roll(1, 0).nan_to_num(1.0))
    with pytest.raises(AssertionError, match="aw: got"):
        assert_close("aw", case.backward(device, pow2, h8)[8][:used], 2 * aw[:used])


@pow2s
def test_padding_is_zero(device: torch.device, pow2: bool) -> None:
    case = Case((5, 1, 1, 128))
    pad = (case.slots == -1).nonzero().flatten()
    outputs = (*case.forward(device, pow2)[:2], *case.backward(device, pow2)[:7])
    data, scale, dh, dh_scale, dh_t, _, aw_t, _, dprob = (t.cpu() for t in outputs)
    for rows in (data, dh, dh_t.view(torch.uint8).t(), aw_t.view(torch.uint8).t()):
        assert not rows.view(torch.uint8)[pad].any()
    floor = reference.cast_per_token(torch.zeros(1, 128).bfloat16(), pow2)[1]
    assert floor.item() >= AMAX_FLOOR / 448
    assert (scale[pad] == floor).all() and (dh_scale[pad] == floor).all()
    assert not dprob[:, pad].any()


def test_extreme_values(device: torch.device) -> None:
    """Rows of zeros, of huge and of tiny values, and gates where the sigmoid is 0 or 1."""
    case = Case((300, 1, 2, 256))
    rows = (case.slots >= 0).nonzero().flatten()
    h, da, columns = case.h, case.da, case.columns
    h[rows[3]] = 0
    da[rows[4]] = 0
    h[rows[5], :columns] = -100
    h[rows[6], :columns] = 100
    h[rows[7]] *= 2.0**60
    h[rows[8], columns:] *= 2.0**-60
    da[rows[9]] *= 2.0**30
    da[rows[10]] *= 2.0**-30
    for pow2 in (True, False):
        out = case.backward(device, pow2)
        used = case.used
        dh, aw, _, _, terms = case.exact()
        assert_close("dh", out[7][:used], dh[:used], CANCELLATION * terms[:used])
        assert_close("aw", out[8][:used], aw[:used])
        assert_casts(case, out, pow2)
        data, scale, rounded = case.forward(device, pow2)
        assert_close("aw", rounded[:used], aw[:used])
        assert_per_token("aw", rounded[:used], (data, scale), pow2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["gate", "up", "da"])
def test_a_bad_value_stays_in_its_blocks(device: torch.device, where: str, bad: float) -> None:
    case = Case((300, 1, 2, 256))
    row = int((case.slots == 200).nonzero())
    if where == "da":
        case.da[row, 130] = bad
    else:
        case.h[row, 130 + (case.columns if where == "up" else 0)] = bad
    for pow2 in (True, False):
        out = case.backward(device, pow2)
        assert_casts(case, out, pow2)
        bad_rows = out[1][: case.used].isnan().nonzero().tolist()
        assert bad_rows and all(r == row and block in (1, 3) for r, block in bad_rows)
        for channel, block in out[3][:, : case.used // 128].isnan().nonzero().tolist():
            assert channel % case.columns == 130 and block == row // 128
        spoiled = out[5][:, : case.used // 128].isnan().nonzero().tolist()
        assert spoiled == ([[1, row // 128]] if where != "da" else [])
        data, scale, rounded = case.forward(device, pow2)
        assert_per_token("aw", rounded[: case.used], (data, scale), pow2)
        assert scale[: case.used].isnan().nonzero().tolist() in ([], [[row, 1]])
    spoiled = ~out[6][:, : case.used].isfinite()
    assert spoiled.nonzero().tolist() in ([], [[1, row]])


@pow2s
@pytest.mark.parametrize("fp8", [False, True], ids=["h bf16", "h fp8"])
def test_the_activation_does_not_depend_on_da(device: torch.device, fp8: bool, pow2: bool) -> None:
    """Where only dw2 is asked for, da is zeros. A block of zeros has the floor's scale."""
    case = Case((300, 2, 5, 256))
    case.h[128:256, 128:256] = 0  # the gate of one block
    h8 = case.in_fp8(pow2) if fp8 else None
    first = case.backward(device, pow2, h8)
    case.da.zero_()
    second = case.backward(device, pow2, h8)
    assert_casts(case, second, pow2)
    assert_bits("aw_t data", second[4][:, : case.used], first[4][:, : case.used].cpu())
    assert_bits(
        "aw_t scale", second[5][:, : case.used // 128], first[5][:, : case.used // 128].cpu()
    )
    floor = reference.cast_per_token(torch.zeros(1, 128).bfloat16(), pow2)[1]
    at_floor = (second[5][:, : case.used // 128].cpu() == floor).nonzero().tolist()
    assert at_floor == [[1, 1]]
    for rows in (second[0][: case.used], second[2][:, : case.used], second[4][128:, 128:256]):
        assert not (rows.cpu().view(torch.uint8) & 0x7F).any()
    assert not second[6][:, : case.used].any()


def test_two_runs_are_equal(device: torch.device) -> None:
    case = Case((400, 2, 5, 256))
    first, second = case.backward(device, True), case.backward(device, True)
    used = case.used
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.dtype == FP8_DTYPE:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        wide = a.shape[0] == case.capacity
        blocks = used if a.shape[1] == case.capacity else used // 128
        at = (slice(used), slice(None)) if wide else (slice(None), slice(blocks))
        assert torch.equal(a[at], b[at]), f"output {i}"


@pytest.mark.parametrize(
    "planted", ["weight", "derivative", "one row", "sum", "byte", "block byte", "block scale"]
)
def test_a_planted_error_is_noticed(planted: str) -> None:
    case = Case((70, 2, 3, 256))
    used = case.used
    dh, aw, partial, sizes, terms = case.exact()
    out = [t.clone() for t in case.backward(torch.device("cpu"), True)]
    assert_close("dh", out[7][:used], dh[:used], CANCELLATION * terms[:used])
    if planted == "sum":
        error = (out[6].double() * (1 + 1e-3) - partial)[:, :used].abs()
        assert not bool((error <= 1e-5 * sizes[:, :used]).all())
        return
    if planted == "byte":
        out[2].view(torch.uint8)[11, 7] ^= 1
        with pytest.raises(AssertionError, match="dh_t data"):
            assert_casts(case, tuple(out), True)
        return
    if planted.startswith("block"):
        if planted == "block byte":
            out[4].view(torch.uint8)[200, 7] ^= 1
        else:
            out[5][1, 0] *= 2
        with pytest.raises(
            AssertionError, match="aw_t data" if "byte" in planted else "aw_t scale"
        ):
            assert_casts(case, tuple(out), True)
        return
    if planted == "weight":  # the routing weight of the next slot
        case.weights = case.weights.flatten().roll(1).view_as(case.weights)
        wrong = case.backward(torch.device("cpu"), True)[7]
    elif planted == "derivative":  # that of a sigmoid of slope 1.01
        wrong = (out[7].float() * 1.01).bfloat16()
    else:
        wrong = out[7].clone()
        wrong[(case.slots >= 0).nonzero()[9]] *= 1.02
    with pytest.raises(AssertionError, match="dh: got"):
        assert_close("dh", wrong[:used], dh[:used], CANCELLATION * terms[:used])


# ----------------------------------------------------------------------------- shapes and bad input


def test_fake_outputs_match_real_ones() -> None:
    case = Case((50, 2, 3, 256))
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (swiglu.swiglu_cast, (case.h, case.weights, case.slots, True)),
        (swiglu.swiglu_cast_both, (case.h, case.weights, case.slots, True)),
        (
            swiglu.swiglu_backward_cast,
            (*case.in_fp8(True), case.da, case.weights, case.slots, True),
        ),
        (swiglu.swiglu_backward_cast, (case.h, None, case.da, case.weights, case.slots, True)),
    ]
    for call, args in calls:
        real = call(*args)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = call(*fakes)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), call
    assert real[5].shape == (ceil_div(256, 128), case.capacity // 128)
    assert real[6].shape == (ceil_div(256, 128), case.capacity)
