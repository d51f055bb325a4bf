"""FrozenExperts: memory, state, merging, compilation, data parallelism."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fp8moe
from fp8moe import quant, testing
from fp8moe.modules import FrozenExperts, LowRankUpdate

E, H, I, T, K = 4, 256, 128, 96, 2  # noqa: E741


def weights(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    w13 = torch.randn(E, 2 * I, H, generator=g) / H**0.5
    return w13, torch.randn(E, H, I, generator=g) / I**0.5


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, p = testing.random_topk(T, K, E, 0, "uniform", 0.0)
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).bfloat16(), ids, p


def with_lora(seed: int = 0, **kwargs) -> FrozenExperts:
    experts = FrozenExperts.from_weights(*weights(seed), **kwargs)
    experts.add_lora(8, 16.0)
    for update in experts.updates().values():
        nn.init.normal_(update.lora_B, std=0.05)
    return experts


# ------------------------------------------------------------------------------- one expert layer


@pytest.mark.parametrize("keep_transpose", [False, True])
def test_memory_is_one_byte_a_weight(keep_transpose):
    experts = FrozenExperts.from_weights(*weights(), keep_transpose=keep_transpose)
    count = 3 * E * H * I
    held = sum(t.numel() * t.element_size() for t in (*experts.buffers(), *experts.parameters()))
    copies = 2 if keep_transpose else 1
    assert held == copies * (count + count // 128**2 * 4)
    assert list(experts.parameters()) == []


def test_forward_takes_both_ways_of_keeping_transposes_to_the_same_bits():
    x, ids, p = routed()
    results = []
    for keep in (False, True):
        leaf = x.clone().requires_grad_()
        y = FrozenExperts.from_weights(*weights(), keep_transpose=keep)(leaf, ids, p)
        results.append((y, *torch.autograd.grad(y.float().square().mean(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half().float()])
def test_conversion_to_another_dtype_leaves_the_fp8_bits_alone(convert):
    experts = with_lora(config=fp8moe.FP8Config(pow2_weight_scales=False))
    before = [t.clone() for t in experts.buffers()]
    y = experts(*routed()).detach()
    scale = experts.w13.scale
    assert not torch.equal(scale.bfloat16().float(), scale)  # there is something to lose
    convert(experts)
    assert all(torch.equal(a, b) for a, b in zip(before, experts.buffers(), strict=True))
    assert testing.sqnr_db(experts(*routed()).detach(), y) > 30


def test_state_dict_round_trip_refreshes_the_transposes():
    first = with_lora(0, keep_transpose=True)
    second = with_lora(1, keep_transpose=True)
    assert not torch.equal(first(*routed()), second(*routed()))
    second.load_state_dict(first.state_dict())
    x, ids, p = routed()
    leaf = x.clone().requires_grad_()
    grads = [torch.autograd.grad(m(leaf, ids, p).sum(), leaf)[0] for m in (first, second)]
    assert torch.equal(*grads)
    assert not any(name.endswith(("t_data", "t_scale")) for name in first.state_dict())


def test_deepcopy_and_pickle_keep_everything(tmp_path):
    experts = with_lora(keep_transpose=True)
    torch.save(experts, tmp_path / "experts.pt")
    again = torch.load(tmp_path / "experts.pt", weights_only=False)
    assert torch.equal(again(*routed()), experts(*routed()))


def test_weights_are_stable_under_another_cast():
    """What was frozen, dequantized and frozen again has the same bytes."""
    experts = FrozenExperts.from_weights(*weights())
    full = [quant.dequantize(w).bfloat16() for w in (experts.w13, experts.w2)]
    again = FrozenExperts.from_weights(*full)
    pairs = zip(experts.buffers(), again.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_merging_gives_the_forward_of_the_updates():
    """Merged in BF16 they agree to rounding; merged in FP8, to one more cast of the weights."""
    experts = with_lora()
    x, ids, p = routed()
    expected = experts(x, ids, p).detach()
    plain = FrozenExperts.from_weights(*weights())(x, ids, p)
    assert testing.sqnr_db(plain, expected) < 12  # the updates matter
    in_fp32 = experts.to_experts(torch.float32)
    in_fp32.config = fp8moe.FP8Config.bf16()
    assert (
        testing.sqnr_db(in_fp32(x, ids, p).detach(), expected) > 25
    )  # FP8 activations against BF16 ones
    experts.merge_adapters()
    assert experts.updates() == {}
    assert list(experts.parameters()) == []
    assert testing.sqnr_db(experts(x, ids, p), expected) > 23
    # Negative control: the weight itself is what merging must give, not half an update.
    for name, full in zip(("w13", "w2"), (in_fp32.w13, in_fp32.w2), strict=True):
        assert testing.sqnr_db(quant.dequantize(getattr(experts, name)), full.detach()) > 30


def test_a_merge_that_forgets_the_scaling_is_noticed(monkeypatch):
    expected = with_lora()(*routed()).detach()
    monkeypatch.setattr(LowRankUpdate, "scaling", 1.0)
    experts = with_lora()
    experts.merge_adapters()
    assert testing.sqnr_db(experts(*routed()), expected) < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 12}, "rank: expected a positive multiple of 8, got 12"),
        ({"rank": 0}, "rank: expected"),
        ({"alpha": 0.0}, "alpha: expected a positive number, got 0.0"),
        ({"alpha": "16"}, "alpha: expected a positive number, got '16'"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"dtype": torch.float16}, "dtype: expected"),
    ],
)
def test_bad_settings_of_updates(change, message):
    experts = FrozenExperts.from_weights(*weights())
    with pytest.raises(ValueError, match=message):
        experts.add_lora(**{"rank": 8, "alpha": 16.0, **change})
    assert experts.updates() == {}


def test_second_update_is_refused():
    with pytest.raises(RuntimeError, match="have low-rank updates already"):
        with_lora().add_lora(8, 16.0)


def test_set_weights_checks_before_it_changes_anything():
    experts = FrozenExperts.from_weights(*weights())
    before = [t.clone() for t in experts.buffers()]
    good, bad = experts.w13, quant.per_block(torch.randn(E, I, H))
    with pytest.raises(ValueError, match=r"w2\.data: expected contiguous"):
        experts.set_weights(quant.per_block(torch.randn(E, 2 * I, H)), bad)
    with pytest.raises(ValueError, match=r"w13\.scale: expected contiguous"):
        experts.set_weights(quant.FP8Tensor(good.data, good.scale.mT), experts.w2)
    assert all(torch.equal(a, b) for a, b in zip(before, experts.buffers(), strict=True))


@pytest.mark.parametrize("sizes", [(0, 256, 128), (4, 200, 128), (4, 256, 0)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="expected"):
        FrozenExperts(*sizes)


# -------------------------------------------------------------------------------- other machinery


@pytest.mark.parametrize("keep_transpose", [False, True])
def test_compiles_without_graph_breaks(keep_transpose):
    experts = with_lora(keep_transpose=keep_transpose)
    x, ids, p = routed()
    leaves = [x.requires_grad_(), *experts.parameters()]
    results = []
    for module in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        y = module(x, ids, p)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.dist
def test_data_parallel_synchronises_the_weights(tmp_path):
    """One process is enough to see that gloo takes every buffer, and that it would refuse FP8."""
    dist = pytest.importorskip("torch.distributed")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = with_lora()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(*routed()).sum().backward()
        assert model.w2_lora.lora_B.grad.any()
        model.register_buffer("fp8", torch.zeros(4, dtype=torch.float8_e4m3fn))
        with pytest.raises(RuntimeError):
            nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_memory_of_a_step_on_the_gpu():
    """Weights are held in one byte each, and their transposes only while backward needs them."""
    e, h, i = 8, 2048, 1024
    weights_bytes = 3 * e * h * i
    before = torch.cuda.memory_allocated()
    w13 = torch.randn(e, 2 * i, h, device="cuda", dtype=torch.bfloat16)
    w2 = torch.randn(e, h, i, device="cuda", dtype=torch.bfloat16)
    experts = FrozenExperts.from_weights(w13, w2)
    del w13, w2
    assert torch.cuda.memory_allocated() - before < 1.02 * weights_bytes
    ids, p = testing.random_topk(128, 2, e, 0, "uniform", 0.0)
    x = torch.randn(128, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    experts(x, ids.cuda(), p.cuda()).sum().backward()
    x.grad = None
    assert torch.cuda.memory_allocated() - before < 1.1 * weights_bytes
