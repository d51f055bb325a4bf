"""freeze_experts, merge_adapters and train_only_adapters: whole models, in place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import fp8moe
from fp8moe import testing
from fp8moe.modules import FrozenExperts
from fp8moe.modules.expert_list import ListedExperts

E, H, I, T, K = 4, 256, 128, 96, 2  # noqa: E741


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, p = testing.random_topk(T, K, E, 0, "uniform", 0.0)
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).bfloat16(), ids, p


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
        ((Transposed,), {}, r"layers\.1: Transposed: gate_up_proj is \(4, 256, 512\); expected"),
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
