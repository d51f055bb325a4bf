"""The expert layer in training: main_grad, autocast, checkpointing, frozen parts, compilation."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.functional import grouped_linear, swiglu_experts, weight_cache_info

CONFIGS = {
    "fp8": FP8Config(),
    "fp8 saved": FP8Config(save="fp8"),
    "recompute": FP8Config(save="recompute"),
    "no cache": FP8Config(cache_weights=False),
    "wgrad bf16": FP8Config(wgrad="bf16"),
    "bf16": FP8Config.bf16(),
    "bf16 recompute": FP8Config.bf16(save="recompute"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# --------------------------------------------------------------------------------------- main_grad


@each_config
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_gets_the_gradient(make_layer, config, weight_dtype):
    layer = make_layer(weight_dtype=weight_dtype)
    expected = layer.run(config)
    x, weights, w13, w2 = layer.leaves()
    for w in (w13, w2):
        w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    layer.forward(x, weights, w13, w2, config).backward(layer.dy)
    for w, grad in ((w13, expected.dw13), (w2, expected.dw2)):
        assert w.grad is None and w.grad_added_to_main_grad is True
        assert torch.equal(w.main_grad.to(weight_dtype), grad)
    assert torch.equal(x.grad, expected.dx) and torch.equal(weights.grad, expected.dprob)


def test_main_grad_is_added_to_over_micro_batches(make_layer):
    layer = make_layer()
    other = make_layer(seed=1).but(w13=layer.w13, w2=layer.w2)
    grads = [part.run() for part in (layer, other)]
    _, _, w13, w2 = layer.leaves()
    start = torch.randn_like(w13)
    w13.main_grad, w2.main_grad = start.clone(), torch.zeros_like(w2)
    for part in (layer, other):
        x, weights, _, _ = part.leaves()
        part.forward(x, weights, w13, w2, FP8Config()).backward(part.dy)
    torch.testing.assert_close(w13.main_grad, start + grads[0].dw13 + grads[1].dw13)
    assert torch.equal(w2.main_grad, grads[0].dw2 + grads[1].dw2)


def test_main_grad_of_one_weight_only(make_layer):
    layer = make_layer()
    expected = layer.run()
    x, weights, w13, w2 = layer.leaves()
    w2.main_grad = torch.zeros_like(w2)
    layer.forward(x, weights, w13, w2, FP8Config()).backward(layer.dy)
    assert torch.equal(w13.grad, expected.dw13) and torch.equal(w2.main_grad, expected.dw2)
    assert w2.grad is None and not hasattr(w13, "grad_added_to_main_grad")


def test_main_grad_replaced_between_forward_and_backward(make_layer):
    layer = make_layer()
    x, weights, w13, w2 = layer.leaves()
    w2.main_grad = torch.zeros_like(w2)
    y = layer.forward(x, weights, w13, w2, FP8Config())
    old, w2.main_grad = w2.main_grad, torch.ones_like(w2)
    y.backward(layer.dy)
    assert not old.any() and torch.equal(w2.main_grad, 1 + layer.run().dw2)


def test_main_grad_untouched_when_frozen_and_with_no_tokens(make_layer):
    layer = make_layer()
    x, weights, w13, w2 = layer.leaves()
    w2 = w2.detach()
    w13.main_grad, w2.main_grad = torch.zeros_like(w13), torch.zeros_like(w2)
    layer.forward(x, weights, w13, w2, FP8Config()).backward(layer.dy)
    assert w13.main_grad.any() and not w2.main_grad.any()
    before = w13.main_grad.clone()
    none = layer.but(ids=layer.ids[:0])
    none.forward(x[:0], weights[:0], w13, w2, FP8Config()).sum().backward()
    assert torch.equal(w13.main_grad, before)


def test_grouped_linear_main_grad(device):
    x = torch.randn(256, 128, device=device).bfloat16()
    ends = torch.tensor([100, 256], dtype=torch.int32, device=device)
    for config in (FP8Config(), FP8Config.bf16()):
        w = torch.randn(2, 64, 128, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(grouped_linear(x, w, ends, config=config).sum(), w)
        w.main_grad = torch.ones_like(w)
        grouped_linear(x, w, ends, config=config).sum().backward()
        assert w.grad is None and torch.equal(w.main_grad, 1 + grad)


# ------------------------------------------------------------------- one weight, several uses


@each_config
def test_gradients_accumulate_over_micro_batches(make_layer, config):
    layer = make_layer()
    x, weights, w13, w2 = layer.leaves()
    for _ in range(2):
        layer.forward(x, weights, w13, w2, config).backward(layer.dy)
    once = layer.run(config)
    assert torch.equal(w13.grad, 2 * once.dw13) and torch.equal(w2.grad, 2 * once.dw2)
    assert torch.equal(weights.grad, 2 * once.dprob)


@each_config
def test_one_weight_used_twice_in_a_graph(make_layer, config):
    """A shared expert layer: y = f(x + f(x))."""
    layer = make_layer()
    x, weights, w13, w2 = layer.leaves()

    def f(x):
        return layer.forward(x, weights, w13, w2, config)

    f(x + f(x)).backward(layer.dy)

    inner_x, inner_p, inner_w13, inner_w2 = layer.leaves()
    inner = layer.forward(inner_x, inner_p, inner_w13, inner_w2, config)
    middle = (inner_x + inner).detach().requires_grad_()
    outer = layer.but(x=middle).run(config)
    residual, *grads = torch.autograd.grad(inner, (inner_x, inner_p, inner_w13, inner_w2), outer.dx)
    assert torch.equal(x.grad, outer.dx + residual)
    for leaf, a, b in zip(
        (weights, w13, w2), grads, (outer.dprob, outer.dw13, outer.dw2), strict=True
    ):
        torch.testing.assert_close(leaf.grad, a + b)


def test_one_weight_used_twice_adds_to_main_grad_twice(make_layer):
    layer = make_layer()
    x, weights, w13, w2 = layer.leaves()

    def f(x):
        return layer.forward(x, weights, w13, w2, FP8Config())

    f(x + f(x)).backward(layer.dy)
    plain = w13.grad, w2.grad
    x, weights, w13, w2 = layer.leaves()
    w13.main_grad, w2.main_grad = torch.zeros_like(w13), torch.zeros_like(w2)
    f(x + f(x)).backward(layer.dy)
    torch.testing.assert_close((w13.main_grad, w2.main_grad), plain)


def test_weight_changed_between_forward_and_backward_counts_as_it_was(make_layer):
    """With cached copies backward uses the forward's weights; without, autograd refuses."""
    layer = make_layer()
    expected = layer.run()
    x, weights, w13, w2 = layer.leaves()
    y = layer.forward(x, weights, w13, w2, FP8Config())
    with torch.no_grad():
        w13.mul_(2)
    assert torch.equal(torch.autograd.grad(y, x, layer.dy)[0], expected.dx)
    y = layer.forward(x, weights, w13, w2, FP8Config(cache_weights=False))
    with torch.no_grad():
        w13.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x, layer.dy)


@each_config
def test_differentiating_twice_is_refused(make_layer, config):
    layer = make_layer(tokens=16)
    leaves = layer.leaves()
    y = layer.forward(*leaves, config)
    (dx,) = torch.autograd.grad(y, leaves[0], layer.dy.clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


# ------------------------------------------------------------------------- gradients not asked for


class CountGemms(TorchDispatchMode):
    """Counts the operators of the package whose name says GEMM."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("fp8moe::")
        if "gemm" in name or name.startswith("bf16_"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_fused_path_runs_only_the_gemms_it_needs(make_layer, wanted):
    layer = make_layer()
    full = layer.run()
    leaves = [leaf.requires_grad_(need) for leaf, need in zip(layer.leaves(), wanted, strict=True)]
    x, p, w13, w2 = wanted
    with CountGemms() as count:
        y = layer.forward(*leaves, FP8Config())
        y.backward(layer.dy)
    assert count.counts["m_grouped_gemm_nt"] == 2 + (x or p or w13) + x
    assert count.counts["k_grouped_gemm"] == w13 + w2
    expected = (full.dx, full.dprob, full.dw13, full.dw2)
    for leaf, need, grad in zip(leaves, wanted, expected, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_composed_path_runs_only_the_gemms_it_needs(make_layer, wanted):
    layer = make_layer()
    config = FP8Config.bf16()
    leaves = [leaf.requires_grad_(need) for leaf, need in zip(layer.leaves(), wanted, strict=True)]
    x, p, w13, w2 = wanted
    with CountGemms() as count:
        layer.forward(*leaves, config).backward(layer.dy)
    assert count.counts["bf16_grouped_linear"] == 2
    assert count.counts["bf16_grouped_dgrad"] == (x or p or w13) + x
    assert count.counts["bf16_grouped_wgrad"] == w13 + w2


def test_no_grad_prepares_nothing_for_backward(make_layer):
    layer = make_layer()
    leaves = layer.leaves()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, CountGemms() as count:
            y = layer.forward(*leaves, FP8Config())
        assert not y.requires_grad and sum(count.counts.values()) == 2
        assert torch.equal(y, layer.run().y)
    held = weight_cache_info()
    layer.forward(*leaves, FP8Config())
    assert weight_cache_info().bytes > held.bytes  # now with the transposes


@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
def test_what_is_saved(make_layer, save):
    """The caller's own x; h as configured; no activation, no permuted copy."""
    layer = make_layer(tokens=1024, experts=2)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        leaves = layer.leaves()
        layer.forward(*leaves, FP8Config(save=save))
    rows = 1024 * 2 // 128 * 128 + 128
    activations = {(tuple(t.shape), t.dtype) for t in saved if t.dim() == 2 and t.shape[1] >= 128}
    fp8 = torch.float8_e4m3fn
    h = {"bf16": {((rows, 256), torch.bfloat16)}, "fp8": {((rows, 256), fp8)}, "recompute": set()}
    assert activations == {((1024, 256), layer.x.dtype)} | h[save]
    assert any(t.data_ptr() == leaves[0].data_ptr() for t in saved)


@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
def test_changing_x_before_backward_is_refused(make_layer, save):
    layer = make_layer()
    x, *others = layer.leaves()
    x = x.clone()  # a leaf that requires a gradient could not be changed at all
    y = layer.forward(x, *others, FP8Config(save=save))
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(layer.dy)


# --------------------------------------------------------------------- autocast and checkpointing


@each_config
def test_autocast_chooses_the_output_dtype_and_nothing_else(make_layer, config):
    layer = make_layer(dtype=torch.float32)
    plain = layer.run(config)
    leaves = layer.leaves()
    with torch.autocast(layer.x.device.type, dtype=torch.bfloat16):
        y = layer.forward(*leaves, config)
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain.y.bfloat16())
    grads = torch.autograd.grad(y, leaves, layer.dy.bfloat16())
    assert [g.dtype for g in grads] == [torch.float32] * 4
    again = layer.forward(*leaves, config)
    reference = torch.autograd.grad(again, leaves, layer.dy.bfloat16().float())
    assert all(torch.equal(a, b) for a, b in zip(grads, reference, strict=True))


@each_config
def test_backward_inside_autocast(make_layer, config):
    layer = make_layer()
    plain = layer.run(config)
    with torch.autocast(layer.x.device.type, dtype=torch.bfloat16):
        inside = layer.run(config)
    assert all(plain.equal(inside).values())


@pytest.mark.parametrize("reentrant", [False, True])
@each_config
def test_activation_checkpointing(make_layer, config, reentrant):
    layer = make_layer()
    plain = layer.run(config)
    leaves = layer.leaves()

    def f(x, weights, w13, w2):
        return layer.forward(x, weights, w13, w2, config)

    y = checkpoint(f, *leaves, use_reentrant=reentrant)
    grads = torch.autograd.grad(y, leaves, layer.dy) if not reentrant else None
    if reentrant:
        y.backward(layer.dy)
        grads = [leaf.grad for leaf in leaves]
    expected = (plain.dx, plain.dprob, plain.dw13, plain.dw2)
    assert torch.equal(y, plain.y)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_main_grad_and_autocast(make_layer, reentrant):
    layer = make_layer()
    expected = layer.run()
    x, weights, w13, w2 = layer.leaves()
    w13.main_grad, w2.main_grad = torch.zeros_like(w13), torch.zeros_like(w2)
    with torch.autocast(layer.x.device.type, dtype=torch.bfloat16):
        y = checkpoint(
            lambda x, weights: layer.forward(x, weights, w13, w2, FP8Config()),
            *(x, weights),
            use_reentrant=reentrant,
        )
    y.backward(layer.dy)
    assert torch.equal(w13.main_grad, expected.dw13) and torch.equal(w2.main_grad, expected.dw2)
    assert w13.grad is None and w2.grad is None and torch.equal(x.grad, expected.dx)


def through_host(t):
    return t.device, t.contiguous().cpu()  # as offloading does: the strides of a scale are lost


OFFLOADED = ("fp8", "fp8 saved", "recompute", "no cache", "bf16")


@pytest.mark.parametrize("config", [CONFIGS[name] for name in OFFLOADED], ids=OFFLOADED)
def test_saved_tensors_may_come_back_with_other_strides(make_layer, config):
    layer = make_layer(tokens=190)
    expected = layer.run(config)
    leaves = layer.leaves()
    with torch.autograd.graph.saved_tensors_hooks(through_host, lambda p: p[1].to(p[0])):
        y = layer.forward(*leaves, config)
    grads = torch.autograd.grad(y, leaves, layer.dy)
    for a, b in zip(grads, expected[1:], strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------- compilation


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 saved", "recompute", "no cache", "bf16"])
def test_compiles_as_one_graph(make_layer, name):
    layer = make_layer()
    config = CONFIGS[name]
    expected = layer.run(config)
    before = weight_cache_info()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x, weights, w13, w2):
        return swiglu_experts(x, layer.ids, weights, w13, w2, config=config)

    leaves = layer.leaves()
    y = f(*leaves)
    grads = torch.autograd.grad(y, leaves, layer.dy)
    assert torch.equal(y, expected.y)
    for a, b in zip(grads, expected[1:], strict=True):
        assert torch.equal(a, b)
    assert weight_cache_info() == before


@pytest.mark.slow
def test_main_grad_under_compile_is_refused(make_layer):
    layer = make_layer()
    x, weights, w13, w2 = layer.leaves()
    w2.main_grad = torch.zeros_like(w2)
    f = torch.compile(swiglu_experts, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"w2\.main_grad"):
        f(x, layer.ids, weights, w13, w2)


# ---------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("config", [FP8Config(), FP8Config.bf16()], ids=["fp8", "bf16"])
def test_a_layer_learns_a_teacher(make_layer, config):
    """A few steps of Adam towards the outputs of another layer."""
    layer, teacher = make_layer(), make_layer(seed=1)
    target = teacher.but(x=layer.x, ids=layer.ids, weights=layer.weights).exact().y.float()
    _, _, w13, w2 = layer.leaves()
    optimizer = torch.optim.Adam([w13, w2], lr=1e-2)
    losses = []
    for _ in range(20):
        y = layer.forward(layer.x, layer.weights, w13, w2, config)
        loss = (y.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert testing.sqnr_db(y.detach(), target) > 1
