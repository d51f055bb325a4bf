"""The weight cache: what hits, what invalidates, what it never holds."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from fp8moe import quant
from fp8moe.config import FP8Config
from fp8moe.functional import clear_weight_cache, swiglu_experts, weight_cache_info
from fp8moe.functional.weight_cache import bf16_weight, fp8_weight

SHAPE = (2, 256, 128)


@pytest.fixture
def w(device):
    return nn.Parameter(torch.randn(SHAPE, device=device))


def use(w, *, pow2=True, transposed=True, cache=True):
    """(copies, casts it took)"""
    before = weight_cache_info()
    copies = fp8_weight(w, pow2=pow2, transposed=transposed, cache=cache)
    after = weight_cache_info()
    misses = after.misses - before.misses
    assert not cache or misses + after.hits - before.hits in (0, 1)
    return copies, misses


def fresh(w):
    """The copies are those of w's value now."""
    (row, transpose), _ = use(w)
    expected = quant.per_block_both(w.detach())
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for pair in zip((row, transpose), expected, strict=True)
        for a, b in zip(*pair, strict=True)
    )


def test_second_use_is_served_from_the_cache(w):
    (row, transpose), casts = use(w)
    assert casts == 1 and fresh(w)
    (again, again_t), casts = use(w)
    assert casts == 0 and again is row and again_t is transpose
    assert use(w, transposed=False)[1] == 0


def test_formats_are_separate(w):
    use(w)
    assert use(w, pow2=False)[1] == 1
    assert use(w)[1] == 0 and use(w, pow2=False)[1] == 0


def test_transpose_is_made_from_the_row_copy(w):
    (row, none), casts = use(w, transposed=False)
    assert casts == 1 and none is None
    (again, transpose), casts = use(w)
    assert casts == 1 and again is row
    assert torch.equal(transpose.data.view(torch.uint8), row.data.view(torch.uint8).mT)


INVALIDATIONS = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.randn_like(w)),
    "slice": lambda w: w[0, 3].zero_(),
    "view": lambda w: w.view(-1)[5:9].fill_(7),
    "data swapped": lambda w: setattr(w, "data", torch.randn_like(w)),
    "load_state_dict": lambda w: nn.ParameterDict({"w": w}).load_state_dict(
        {"w": torch.randn_like(w)}
    ),
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w),
}


@pytest.mark.parametrize("change", INVALIDATIONS.values(), ids=INVALIDATIONS)
def test_updates_invalidate(w, change):
    assert fresh(w)
    with torch.no_grad():
        change(w)
    _, casts = use(w)
    assert casts == 1 and fresh(w)


class FlatOptimizer(torch.optim.Optimizer):
    """Updates through a buffer that shares the weights' memory: no version changes."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(1)


def test_optimizers_that_write_behind_autograd_invalidate(w):
    assert fresh(w)
    version = w._version
    FlatOptimizer([w]).step()
    assert w._version == version  # the control: nothing else would have shown it
    assert fresh(w)


@pytest.mark.parametrize("foreach", [False, True])
def test_torch_optimizers_invalidate(w, foreach):
    use(w)
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], foreach=foreach).step()
    assert fresh(w)


def test_frozen_weights_outlive_optimizer_steps(w):
    frozen = nn.Parameter(w.detach().clone(), requires_grad=False)
    use(frozen), use(w)
    FlatOptimizer([nn.Parameter(torch.zeros(1))]).step()
    assert use(frozen)[1] == 0 and use(w)[1] == 1
    with torch.no_grad():
        frozen.mul_(2)
    assert use(frozen)[1] == 1


def test_silent_write_needs_clear_weight_cache(w):
    """The documented limit: outside of an optimizer step nothing shows a write through .data."""
    assert fresh(w)
    w.data.mul_(3)
    assert not fresh(w)
    clear_weight_cache()
    assert weight_cache_info().entries == 0
    assert fresh(w)


def test_entries_die_with_their_weights(w):
    clear_weight_cache()
    other = nn.Parameter(torch.randn_like(w))
    use(w), use(other)
    info = weight_cache_info()
    one = 2 * w.numel() + 2 * 4 * 2 * 2 * 1  # FP8 data and FP32 scales, both ways
    assert info.entries == 2 and info.bytes == 2 * one
    del other
    gc.collect()
    assert weight_cache_info()[2:] == (1, one)


def test_an_id_used_again_is_not_mistaken(w):
    for scale in range(1, 20):
        temporary = w.detach() * scale
        assert fresh(temporary)
        del temporary


def test_detached_alias_is_another_weight(w):
    use(w)
    assert use(w.detach())[1] == 1


def test_cache_off_neither_looks_nor_leaves(w):
    clear_weight_cache()
    (row, _), _ = use(w, cache=False)
    assert weight_cache_info().entries == 0
    assert torch.equal(row.scale, quant.per_block(w.detach()).scale)


def test_bf16_copies(w):
    before = weight_cache_info()
    a, b = bf16_weight(w, cache=True), bf16_weight(w, cache=True)
    assert a is b and a.dtype == torch.bfloat16 and torch.equal(a, w.detach().bfloat16())
    after = weight_cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
    with torch.no_grad():
        w.neg_()
    assert torch.equal(bf16_weight(w, cache=True), w.detach().bfloat16())
    stored = nn.Parameter(torch.randn(SHAPE).bfloat16())
    assert bf16_weight(stored, cache=True).data_ptr() == stored.data_ptr()


def test_inference_first_then_training(w):
    """Copies made under inference_mode must be good for backward."""
    with torch.inference_mode():
        (row, transpose), _ = use(w)
    assert not row.data.is_inference() and not transpose.scale.is_inference()
    with torch.inference_mode():
        inference_weight = w.clone()
    assert use(inference_weight)[1] == 0  # not tracked: cast each time, not counted, not kept


def test_subclasses_are_not_cached(w):
    class Wrapped(torch.Tensor):
        pass

    clear_weight_cache()
    wrapped = w.detach().as_subclass(Wrapped)
    use(wrapped)
    assert weight_cache_info().entries == 0


def test_one_cast_per_optimizer_step(make_layer):
    """Micro-batches share the copies; each weight is cast once per step, both ways at once."""
    layer = make_layer(tokens=32)
    _, _, w13, w2 = layer.leaves()
    optimizer = torch.optim.SGD([w13, w2], lr=1e-3)
    start = weight_cache_info()
    for step in range(3):
        for _ in range(4):
            x, weights, _, _ = layer.leaves()
            layer.forward(x, weights, w13, w2, FP8Config()).backward(layer.dy)
        info = weight_cache_info()
        assert info.misses - start.misses == 2 * (step + 1)
        assert info.hits - start.hits == 6 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def test_without_cache_nothing_is_held_between_passes(make_layer):
    layer = make_layer(tokens=32)
    _, _, w13, w2 = layer.leaves()
    held = []

    def pack(t):
        held.append(t)
        return t

    config = FP8Config(cache_weights=False)
    x, weights, _, _ = layer.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = swiglu_experts(x, layer.ids, weights, w13, w2, config=config)
    weights_held = [t for t in held if t.dim() == 3]
    assert {t.data_ptr() for t in weights_held} == {w13.data_ptr(), w2.data_ptr()}
    assert weight_cache_info().entries == 0
    y.backward(layer.dy)
    assert weight_cache_info().entries == 0
