"""FrozenExperts and freeze_experts: memory, state, merging, whole models."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import fp8moe
from fp8moe import quant, testing
from fp8moe.modules import FrozenExperts, LowRankUpdate
from fp8moe.modules.expert_list import ListedExperts

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


# ------------------------------------------------------------------------------------ whole models


class Stacked(nn.Module):
    """An experts module in the layout of transformers."""

    def __init__(self, hidden: int = H, inner: int = I) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * inner, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, hidden, inner) / inner**0.5)
        self.act_fn = nn.SiLU()

    def forward(self, x, ids, p):
        config = fp8moe.FP8Config()
        return fp8moe.swiglu_experts(x, ids, p, self.gate_up_proj, self.down_proj, config=config)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(H, 8)

    def forward(self, x, ids, p):
        for layer in self.layers:
            x = x + layer(x, ids, p)
        return self.head(x.float())


@pytest.mark.parametrize("kind", [Stacked, lambda: fp8moe.Experts(E, H, I)])
def test_freezing_keeps_the_function_and_frees_the_weights(kind):
    model = Model(kind(), kind())
    expected = model(*routed()).detach()
    refs = [weakref.ref(p) for layer in model.layers for p in layer.parameters()]
    report = fp8moe.freeze_experts(model)
    gc.collect()
    assert all(ref() is None for ref in refs)
    assert report.frozen == ("layers.0", "layers.1")
    assert report.fp8_bytes == 2 * 3 * E * H * I * (1 + 4 / 128**2)
    assert report.lora_parameters == 0
    assert model.head.weight.requires_grad
    assert torch.equal(model(*routed()), expected)  # FP8 training multiplied with the same values


def test_old_weights_go_before_the_next_layer_is_cast(monkeypatch):
    model = Model(Stacked(), Stacked(), Stacked())
    refs = [weakref.ref(layer.gate_up_proj) for layer in model.layers]
    alive = []
    cast = FrozenExperts.from_weights.__func__

    def watched(cls, *args, **kwargs):
        alive.append([ref() is not None for ref in refs])
        return cast(cls, *args, **kwargs)

    monkeypatch.setattr(FrozenExperts, "from_weights", classmethod(watched))
    fp8moe.freeze_experts(model)
    assert alive == [[True, True, True], [False, True, True], [False, False, True]]


def test_only_updates_train_and_the_loss_falls():
    model = Model(Stacked(), Stacked())
    report = fp8moe.freeze_experts(model, lora_rank=8, lora_alpha=16.0)
    assert fp8moe.train_only_adapters(model) == report.lora_parameters
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names)
    assert len(names) == 8
    target = torch.randint(8, (T,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = [t.clone() for t in model.buffers()]
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(*routed()), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    trained = model(*routed()).detach()
    assert fp8moe.merge_adapters(model) == 2
    assert fp8moe.merge_adapters(model) == 0
    assert testing.sqnr_db(model(*routed()).detach(), trained) > 20


def test_layers_in_two_places_stay_one():
    shared = Stacked()
    model = Model(shared, shared)
    report = fp8moe.freeze_experts(model, lora_rank=8)
    assert report.frozen == ("layers.0",)
    assert model.layers[0] is model.layers[1]


def test_frozen_layers_can_get_updates_later():
    model = Model(Stacked())
    fp8moe.freeze_experts(model)
    before = model.layers[0]
    fp8moe.freeze_experts(model, lora_rank=8)
    assert model.layers[0] is before
    assert set(before.updates()) == {"w13", "w2"}
    with pytest.raises(ValueError, match=r"layers\.0: has low-rank updates already"):
        fp8moe.freeze_experts(model, lora_rank=8)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = Model(Stacked())
    fp8moe.freeze_experts(model, lora_rank=8)
    assert model.layers[0].w13.data.is_meta
    assert model.layers[0].w13.data.dtype == torch.float8_e4m3fn


class Gelu(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.GELU()


class Transposed(Stacked):
    def __init__(self) -> None:
        super().__init__(H, 256)
        self.gate_up_proj = nn.Parameter(self.gate_up_proj.detach().mT.contiguous())


class Sorted(Stacked):
    """Takes rows that are sorted by expert already."""

    def forward(self, rows, group_ends):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ((Transposed,), {}, r"layers\.1: Transposed: expected gate_up_proj .*got \(4, 256, 512\)"),
        ((Sorted,), {}, r"layers\.1: Sorted: .* got forward\(rows, group_ends\)"),
        ((Gelu,), {}, r"layers\.1: Gelu: fp8moe does not support activation GELU"),
        ((lambda: Stacked(H, 80),), {}, r"layers\.1: intermediate_size: .* got 80"),
        ((lambda: fp8moe.Experts(E, 144, 128),), {}, r"layers\.1: hidden_size: .* got 144"),
        ((), {"config": fp8moe.FP8Config.bf16()}, "config: frozen experts"),
        ((), {"lora_rank": 4}, "rank: expected a positive multiple of 8, got 4"),
    ],
)
def test_a_model_that_cannot_be_frozen_is_not_touched(layers, options, message):
    model = Model(Stacked(), *(make() for make in layers))
    before = list(model.layers)
    with pytest.raises(ValueError, match=message):
        fp8moe.freeze_experts(model, **options)
    assert list(model.layers) == before


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="expected expert layers in Linear, found none"):
        fp8moe.freeze_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got one itself"):
        fp8moe.freeze_experts(Stacked())


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.w2 = nn.Linear(128, 128, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(128, 3, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.top_k = 2

    def forward(self, x):
        weight, ids = self.gate(x).softmax(-1).topk(self.top_k)
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + (weight * (ids == e)).sum(-1, keepdim=True) * expert(x)
        return y


def test_replaced_lists_freeze_under_their_old_projection_names(capsys):
    model = nn.Sequential(Block())
    fp8moe.replace_experts(model)
    assert isinstance(model[0].experts, ListedExperts)
    model.bfloat16()
    x = torch.randn(16, 128, dtype=torch.bfloat16)
    expected = model(x)
    fp8moe.freeze_experts(model)
    assert torch.equal(model(x), expected)
    assert model[0].experts.projections == ("w1", "w3", "w2")


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
        model = Model(Stacked())
        fp8moe.freeze_experts(model, lora_rank=8)
        fp8moe.train_only_adapters(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(*routed()).sum().backward()
        assert model.layers[0].w2_lora.lora_B.grad.any()
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
