"""grouped_linear: each GEMM against FP64 on dequantized operands, switches, ragged groups."""

from __future__ import annotations

import itertools

import pytest
import torch

from fp8moe import quant, testing
from fp8moe.config import FP8Config
from fp8moe.functional import grouped_linear

ROWS, N, K, GROUPS = 300, 192, 256, 4


@pytest.fixture
def inputs(device):
    x = torch.randn(ROWS, K, device=device).bfloat16()
    w = torch.randn(GROUPS, N, K, device=device) / K**0.5
    dy = torch.randn(ROWS, N, device=device).bfloat16()
    return x, w, dy


def run(x, w, ends, dy, config):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = grouped_linear(x, w, ends, config=config)
    used = int(ends[-1])
    mask = torch.zeros_like(dy)
    mask[:used] = 1
    dx, dw = torch.autograd.grad(y, (x, w), dy * mask)
    return y.detach()[:used], dx[:used], dw


def exact(x, w, ends, dy):
    x, w, dy = x.double(), w.double(), dy.double()
    y, dx, dw = [], [], torch.zeros_like(w)
    start = 0
    for g, end in enumerate(ends.tolist()):
        y.append(x[start:end] @ w[g].t())
        dx.append(dy[start:end] @ w[g])
        dw[g] = dy[start:end].t() @ x[start:end]
        start = end
    return torch.cat(y), torch.cat(dx), dw


@pytest.mark.parametrize("kind", testing.GROUP_KINDS)
def test_fp8_gemms_on_the_same_operands(inputs, device, kind):
    """Each GEMM against FP64 on what its operands hold after the casts, by the worst row."""
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 1, kind, device)
    y, dx, dw = run(x, w, ends, dy, FP8Config())
    used = int(ends[-1])
    x8, dy8 = (testing.exact(quant.per_token(t)) for t in (x, dy))
    w8 = testing.exact(quant.per_block(w))
    y_ref, dx_ref, _ = exact(x8, w8, ends, dy8)
    assert testing.worst_row_error(y, y_ref) < testing.BF16_ROW_ERROR
    assert testing.worst_row_error(dx, dx_ref) < testing.BF16_ROW_ERROR
    columns = [quant.per_channel(dy, ends), quant.per_channel(x, ends, block=True)]
    dw_ref = testing.oracle_k_grouped_gemm(*columns, ends)
    assert testing.worst_row_error(dw, dw_ref) < testing.FP32_ROW_ERROR
    assert y.shape == (used, N) and dw.dtype == torch.float32


def test_gate_on_the_same_operands_sees_a_wrong_scale_format(inputs, device):
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 1, "uniform", device)
    y, _, dw = run(x, w, ends, dy, FP8Config(pow2_scales=False))
    x8, w8 = testing.exact(quant.per_token(x)), testing.exact(quant.per_block(w))
    assert testing.worst_row_error(y, exact(x8, w8, ends, dy)[0]) > 4 * testing.BF16_ROW_ERROR
    columns = [quant.per_channel(dy, ends), quant.per_channel(x, ends, block=True)]
    reference = testing.oracle_k_grouped_gemm(*columns, ends)
    assert testing.worst_row_error(dw, reference) > 100 * testing.FP32_ROW_ERROR


@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
@pytest.mark.parametrize(
    ("fprop", "dgrad", "wgrad"), list(itertools.product(("fp8", "bf16"), repeat=3))
)
def test_switches(inputs, device, fprop, dgrad, wgrad, save):
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 2, "zipf", device)
    config = FP8Config(fprop, dgrad, wgrad, save=save)
    out, ref = run(x, w, ends, dy, config), exact(x, w, ends, dy)
    db = [testing.sqnr_db(a, b) for a, b in zip(out, ref, strict=True)]
    gates = (testing.SQNR_FORWARD_DB, testing.SQNR_GRADIENT_DB, testing.SQNR_GRADIENT_DB)
    for value, gate, precision in zip(db, gates, (fprop, dgrad, wgrad), strict=True):
        assert value > (gate if precision == "fp8" else 45), db
        assert (value > 45) == (precision == "bf16"), db


def test_saving_x_as_fp8_columns_changes_nothing(inputs, device):
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 2, "uniform", device)
    a, b = (run(x, w, ends, dy, FP8Config(save=save)) for save in ("bf16", "fp8"))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_saved_columns_may_come_back_with_other_strides(inputs, device):
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 2, "uniform", device)
    w = w[:, :, :144].contiguous().requires_grad_()  # 144 columns of x: a scale of odd width
    x = x[:, :144].contiguous()
    grads = []
    for pack in (lambda t: t, lambda t: t.contiguous().clone()):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = grouped_linear(x, w, ends, config=FP8Config(save="fp8"))
        grads.append(torch.autograd.grad(y, w, dy)[0])
    assert torch.equal(*grads)


def test_saved_bytes(inputs, device):
    """save="fp8" keeps FP8 columns of x and lets go of x."""
    x, w, _ = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 2, "uniform", device)

    def saved(config):
        kept = []

        def pack(t):
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            grouped_linear(
                x.clone().requires_grad_(), w.clone().requires_grad_(), ends, config=config
            )
        return {t.dtype for t in kept if t.numel() >= x.numel() and t.dim() == 2}

    assert saved(FP8Config()) == {torch.bfloat16}
    assert saved(FP8Config(save="fp8")) == {torch.float8_e4m3fn}
    assert saved(FP8Config(save="fp8", wgrad="bf16")) == {torch.bfloat16}


def test_unused_rows_do_not_reach_the_results(inputs, device):
    """Rows past the last end may hold anything, NaN included."""
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 3, "slack", device)
    used = int(ends[-1])
    bad = x.clone()
    bad[used:] = float("nan")
    for config in (FP8Config(), FP8Config.bf16()):
        clean, dirty = run(x, w, ends, dy, config), run(bad, w, ends, dy, config)
        assert all(torch.equal(p, q) for p, q in zip(clean, dirty, strict=True))


def test_no_rows(inputs, device):
    x, w, _ = inputs
    x, w = x[:0].clone().requires_grad_(), w.clone().requires_grad_()
    ends = torch.zeros(GROUPS, dtype=torch.int32, device=device)
    y = grouped_linear(x, w, ends)
    y.sum().backward()
    assert y.shape == (0, N) and x.grad.shape == (0, K)
    assert w.grad.shape == w.shape and not w.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(inputs, device, dtype):
    x, w, dy = inputs
    ends = testing.ragged_group_ends(ROWS, GROUPS, 2, "uniform", device)
    for config in (FP8Config(), FP8Config.bf16()):
        y, dx, dw = run(x.to(dtype), w.to(dtype), ends, dy.to(dtype), config)
        assert y.dtype == dx.dtype == dw.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"].to(torch.int8)), "x: expected torch.bfloat16 or"),
        (lambda a: a.update(w=a["w"][0]), r"w: expected shape \(E, N, 256\), got \(192, 256\)"),
        (lambda a: a.update(w=a["w"][..., :-1]), r"w: expected shape \(E, N, 256\), got"),
        (lambda a: a.update(w=a["w"].repeat(1, 2, 1)[:, ::2]), "w: expected a contiguous tensor"),
        (
            lambda a: a.update(w=a["w"][:, :24].contiguous()),
            "w: N, in FP8: expected a multiple of 16",
        ),
        (lambda a: a.update(w=a["w"][:0]), "w: E: expected at least 1, got 0"),
        (
            lambda a: a.update(group_ends=a["group_ends"].long()),
            "group_ends: expected torch.int32, got torch.int64",
        ),
        (
            lambda a: a.update(group_ends=a["group_ends"][1:]),
            r"group_ends: expected shape \(4\), got \(3,\)",
        ),
        (
            lambda a: a["group_ends"].copy_(torch.tensor([5, 3, 8, 9])),
            r"group_ends: expected a non-decreasing sequence, got group_ends\[1\] = 3 after 5",
        ),
        (
            lambda a: a["group_ends"].add_(ROWS),
            rf"group_ends: expected at most {ROWS} .*, got group_ends\[",
        ),
        (lambda a: a.update(group_ends=[1, 2]), "group_ends: expected a tensor, got list"),
    ],
)
def test_bad_input_is_named(inputs, device, change, message):
    if device.type != "cpu":
        pytest.skip("the same checks; group ends are checked on the device")
    x, w, _ = inputs
    arguments = {"x": x, "w": w, "group_ends": testing.ragged_group_ends(ROWS, GROUPS, 2)}
    change(arguments)
    if arguments["w"].shape[0] == 0:
        arguments["group_ends"] = arguments["group_ends"][:0]
    with pytest.raises(ValueError, match=message):
        grouped_linear(**arguments)
