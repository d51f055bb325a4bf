"""The expert layer on the GPU: no host sync, repeatable, capturable, equal to the reference."""

from __future__ import annotations

import pytest
import torch

from fp8moe import check_errors, testing
from fp8moe.config import FP8Config
from fp8moe.functional import clear_weight_cache, swiglu_experts, weight_cache_info
from fp8moe.modules import Experts, MoE, Router, SharedExperts

pytestmark = pytest.mark.gpu

CONFIGS = {
    "fp8": FP8Config(),
    "fp8 saved": FP8Config(save="fp8"),
    "recompute": FP8Config(save="recompute"),
    "no cache": FP8Config(cache_weights=False),
    "wgrad bf16": FP8Config(wgrad="bf16"),
    "bf16": FP8Config.bf16(),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def layer(make_layer):
    """Large enough for several tiles per expert and a ragged split."""
    return make_layer(2048, 4, 16, 512, 384, dropped=0.05, weight_dtype=torch.bfloat16)


@each_config
def test_no_host_sync(layer, config):
    layer.run(config)  # compiles, and makes the buffers that live as long as the process
    leaves = layer.leaves()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer.forward(*leaves, config)
        torch.autograd.grad(y, leaves, layer.dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_sync_detector_works(layer):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            layer.ids.flatten()[0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_module_has_no_host_sync(device, score_func):
    moe = MoE(
        Router(
            512,
            16,
            4,
            score_func=score_func,
            num_groups=4,
            topk_groups=2,
            bias_update_speed=1e-3,
            balance_loss_coeff=0.01,
            z_loss_coeff=0.001,
            jitter=0.01,
        ),
        Experts(16, 512, 256),
        SharedExperts(512, 256, gated=True),
    ).to(device)
    x = torch.randn(4, 256, 512, device=device, requires_grad=True)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, aux_loss = moe(x)
        (y.float().square().mean() + aux_loss).backward()
        moe.router.update_bias()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_config
def test_results_repeat_bit_for_bit(layer, config):
    first = layer.run(config)
    for _ in range(3):
        clear_weight_cache()
        torch.full((1 << 28,), float("nan"), device="cuda")  # spoil memory for the allocator
        assert all(first.equal(layer.run(config)).values())


@each_config
def test_agrees_with_the_reference_backend(layer, config, environment):
    """The kernels and the plain PyTorch backend, same inputs: only rounding between them."""
    kernels = layer.run(config)
    clear_weight_cache()
    environment("FP8MOE_BACKEND", "reference")
    reference = layer.run(config)
    db = {
        name: testing.sqnr_db(a, b)
        for name, a, b in zip(kernels._fields, kernels, reference, strict=True)
    }
    assert min(db.values()) > 38, db


@each_config
def test_against_exact_math(layer, config):
    result, exact = layer.run(config), layer.exact()
    gate = 21.0 if config.save == "fp8" else 22.4
    db = [testing.sqnr_db(a, b) for a, b in zip(result, exact, strict=True)]
    assert min(db) > gate, db


@each_config
def test_cuda_graph_of_forward_and_backward(layer, config):
    """Captured once, replayed on new inputs and new weights."""
    leaves = layer.leaves()
    ids, dy = layer.ids.clone(), layer.dy.clone()

    def step():
        y = swiglu_experts(leaves[0], ids, *leaves[1:], config=config)
        return y, torch.autograd.grad(y, leaves, dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    before = weight_cache_info()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = step()
    assert weight_cache_info() == before  # a replay casts the weights of its own time

    with torch.no_grad():
        leaves[0].copy_(leaves[0].roll(1, 0) * 2)
        ids.copy_(ids.roll(7, 0))
        leaves[2].mul_(0.5)
    graph.replay()
    replayed = [y.clone(), *(g.clone() for g in grads)]
    eager_y, eager_grads = step()
    for a, b in zip(replayed, (eager_y, *eager_grads), strict=True):
        assert torch.equal(a, b)


def test_cuda_graph_with_main_grad(layer):
    expected = layer.run()
    x, weights, w13, w2 = layer.leaves()
    for w in (w13, w2):
        w.main_grad = torch.zeros_like(w, dtype=torch.float32)

    def step():
        layer.forward(x, weights, w13, w2, FP8Config()).backward(layer.dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    x.grad = weights.grad = None
    with torch.cuda.graph(graph):
        step()
    for w in (w13, w2):
        w.main_grad.zero_()
    for _ in range(2):
        graph.replay()
    for w, grad in ((w13, expected.dw13), (w2, expected.dw2)):
        torch.testing.assert_close(w.main_grad, 2 * grad.float(), rtol=1e-2, atol=1e-2)


def test_wrong_expert_id_is_dropped_and_reported(layer):
    bad = layer.ids.clone()
    bad[17, 2] = 99
    dropped = layer.ids.clone()
    dropped[17, 2] = len(layer.w2)
    expected = layer.but(ids=dropped).run().y
    with torch.no_grad(), pytest.raises(ValueError, match="topk_ids.*99"):
        layer.but(ids=bad).forward(*layer.leaves(), FP8Config())
        check_errors()
    check_errors()  # reported once
    assert torch.equal(layer.but(ids=dropped).run().y, expected)


@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
def test_memory_held_for_backward(make_layer, save):
    """Within 5 % of h as configured at padded rows, and the maps: x is the caller's."""
    tokens, topk, experts, hidden, inner = 8192, 4, 8, 1024, 512
    layer = make_layer(tokens, topk, experts, hidden, inner, weight_dtype=torch.bfloat16)
    config = FP8Config(save=save)
    leaves = layer.leaves()
    layer.forward(*leaves, config)  # the weight cache
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer.forward(*leaves, config)
    held = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    rows = tokens * topk + 127 * experts
    scaled = 1 + 4 / 128
    h = {"bf16": 2, "fp8": scaled, "recompute": 0}[save] * rows * 2 * inner
    maps = 4 * (tokens * topk + rows)
    expected = h + maps
    assert held < 1.05 * expected + (1 << 20), (held, expected)


def test_memory_on_top_of_the_gradients(make_layer):
    """The last weight gradient, when all others exist, finds only its operands still there, and
    what forward left (the graph holds h until the layer's backward is over)."""
    tokens, topk, experts, hidden, inner = 4096, 4, 32, 1024, 512
    layer = make_layer(tokens, topk, experts, hidden, inner, weight_dtype=torch.bfloat16)
    leaves = layer.leaves()
    layer.forward(*leaves, FP8Config())  # the weight cache
    y = layer.forward(*leaves, FP8Config())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(y, leaves, layer.dy)
    torch.cuda.synchronize()
    held = sum(g.untyped_storage().nbytes() for g in grads)
    extra = torch.cuda.max_memory_allocated() - before - held
    rows = tokens * topk + 127 * experts
    columns_of_x, columns_of_dh = rows * hidden, rows * 2 * inner * (1 + 4 / 128)
    assert extra < 1.05 * (columns_of_x + columns_of_dh) + (1 << 20), extra


def test_on_a_side_stream(layer):
    expected = layer.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = layer.run()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(expected.equal(result).values())


def test_rows_beyond_32_bit_offsets(make_layer):
    """More than 2**31 elements of h: row offsets must not wrap, forward and backward."""
    if torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs 70 GB")
    layer = make_layer(280_000, 4, 8, 256, 1024, weight_dtype=torch.bfloat16)
    assert layer.ids.numel() * 2 * 1024 > 1 << 31
    result = layer.run()
    last = slice(-256, None)
    tail = layer.but(
        x=layer.x[last], ids=layer.ids[last], weights=layer.weights[last], dy=layer.dy[last]
    ).run()
    assert torch.equal(result.y[last], tail.y)
    assert torch.equal(result.dx[last], tail.dx) and torch.equal(result.dprob[last], tail.dprob)
