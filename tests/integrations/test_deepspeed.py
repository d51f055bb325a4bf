"""DeepSpeed's MoE and AutoEP layers with our experts against their own, in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.integrations.deepspeed import DeepSpeedExperts, Replaced, replace_deepspeed_experts
from fp8moe.testing import same_bits, sqnr_db

pytest.importorskip("deepspeed", reason="needs DeepSpeed")

from deepspeed_models import EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, Swiglu, moe_layer  # noqa: E402

BF16_DB = 35.0  # rounding of every operand and result to BF16
FP8_DB = 20.0  # three FP8 GEMMs in a row


def run(moe: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input; the parameters have theirs in .grad."""
    x = x.clone().requires_grad_()
    y, *_ = moe(x)
    (y * torch.linspace(-1, 1, HIDDEN)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def per_expert(moe: Any, pick: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
    """What `pick` takes of each expert parameter, under DeepSpeed's keys."""
    experts = moe.deepspeed_moe.experts
    if not isinstance(experts, DeepSpeedExperts):
        return {name: pick(p) for name, p in experts.named_parameters()}
    other = DeepSpeedExperts.__new__(DeepSpeedExperts)
    nn.Module.__init__(other)
    other.__dict__ |= {k: v for k, v in experts.__dict__.items() if not k.startswith("_")}
    other.w13, other.w2 = nn.Parameter(pick(experts.w13)), nn.Parameter(pick(experts.w2))
    return dict(other.state_dict())


@pytest.mark.parametrize("names", ["llama", "mixtral", "fused"])
@pytest.mark.parametrize(
    "options",
    [{"k": 1}, {"k": 2}, {"k": 2, "drop_tokens": False}, {"k": 4, "capacity_factor": 2.0}],
    ids=["top1", "top2", "unlimited", "top4"],
)
def test_experts_compute_what_deepspeeds_do(names: str, options: dict[str, Any]) -> None:
    def build(config: FP8Config | None) -> Any:
        moe = moe_layer(Swiglu(names=names), use_rts=False, **options)
        if config is not None:
            replace_deepspeed_experts(moe, config=config)
        return moe

    x = torch.randn(2, TOKENS, HIDDEN)
    plain = build(None)
    y, dx = run(plain, x)
    grads = per_expert(plain, lambda p: p.grad)
    gate = plain.deepspeed_moe.gate.wg.weight.grad

    for config, bar in ((FP8Config.bf16(), BF16_DB), (FP8Config(), FP8_DB)):
        moe = build(config)
        got_y, got_dx = run(moe, x)
        got = per_expert(moe, lambda p: p.grad)
        assert sqnr_db(got_y, y) > bar
        assert sqnr_db(got_dx, dx) > bar
        assert sqnr_db(moe.deepspeed_moe.gate.wg.weight.grad, gate) > bar
        assert got.keys() == grads.keys()
        assert min(sqnr_db(got[key], grads[key]) for key in grads) > bar

    spoilt = build(FP8Config.bf16())
    with torch.no_grad():  # two experts exchange their first matrix
        w13 = spoilt.deepspeed_moe.experts.w13
        w13[:2] = w13[:2].flip(0)
    bad_y, bad_dx = run(spoilt, x)
    assert sqnr_db(bad_y, y) < FP8_DB
    assert sqnr_db(bad_dx, dx) < FP8_DB


def test_unused_rows_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = moe_layer()
    replace_deepspeed_experts(experts)
    experts = experts.deepspeed_moe.experts
    x = torch.randn(2, EXPERTS, 8, HIDDEN)
    x[:, 1, 3:] = 0
    x[0, 2] = 0
    x[1, 3, 0, 5] = torch.nan
    seen: list[torch.Tensor] = []
    import fp8moe.integrations.deepspeed as adapter

    real = adapter.swiglu_experts

    def spy(x: torch.Tensor, topk_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(topk_ids)
        return real(x, topk_ids, *args, **kwargs)

    monkeypatch.setattr(adapter, "swiglu_experts", spy)
    y = experts(x)
    counts = torch.bincount(seen[0].flatten(), minlength=EXPERTS + 1)
    assert counts.tolist() == [16, 6, 8, 16, 10 + 8]
    zero = x.detach().eq(0).all(-1)
    assert y[zero].eq(0).all()
    assert y[1, 3, 0].isnan().all()
    used = ~zero
    used[1, 3, 0] = False
    assert y[used].isfinite().all() and y[used].ne(0).any(-1).all()


def test_parameters_carry_what_zero_looks_at() -> None:
    moe = moe_layer()
    report = replace_deepspeed_experts(moe)
    assert report == [Replaced("MoE", "MoE", EXPERTS, HIDDEN, INTERMEDIATE)]
    experts = moe.deepspeed_moe.experts
    assert [name for name, _ in experts.named_parameters()] == ["w13", "w2"]
    for p in experts.parameters():
        assert (p.allreduce, p.group_name) == (False, "ep_size_1")
    assert "num_local_experts=4, hidden_size=128" in repr(experts)
    frozen = moe_layer()
    frozen.deepspeed_moe.experts.requires_grad_(False)
    replace_deepspeed_experts(frozen)
    assert not any(p.requires_grad for p in frozen.deepspeed_moe.experts.parameters())


@pytest.mark.parametrize("names", ["llama", "mixtral", "fused"])
def test_state_dicts_are_deepspeeds(names: str) -> None:
    plain, moe = (moe_layer(Swiglu(names=names)) for _ in range(2))
    replace_deepspeed_experts(moe)
    for p in plain.parameters():
        nn.init.normal_(p)
    expected = plain.state_dict()
    assert list(moe.state_dict()) == list(expected)
    moe.load_state_dict(expected)
    assert all(same_bits(value, expected[key]) for key, value in moe.state_dict().items())
    again = moe_layer(Swiglu(names=names))
    again.load_state_dict(moe.state_dict())
    assert all(same_bits(value, expected[key]) for key, value in again.state_dict().items())


def test_wrong_state_dicts_are_named() -> None:
    moe = moe_layer()
    replace_deepspeed_experts(moe)
    key = "deepspeed_moe.experts.deepspeed_experts.2.up_proj.weight"
    state = moe.state_dict()
    weight = state.pop(key)
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        moe.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key.*experts.7.up_proj"):
        moe.load_state_dict(state | {key: weight, key.replace(".2.", ".7."): weight})
    with pytest.raises(RuntimeError, match=r"2.up_proj.weight: expected \(128, 128\), got \(3, 4"):
        moe.load_state_dict(state | {key: torch.zeros(3, 4)})
    assert moe.load_state_dict(state, strict=False).missing_keys == [key]


def mixed(moe: Any) -> Any:
    moe.deepspeed_moe.experts.deepspeed_experts[1].up_proj.weight.requires_grad_(False)
    return moe


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))


class Swapped(Swiglu):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * F.silu(self.up_proj(x)))


class Dropping(Swiglu):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: moe_layer(Swiglu(bias=True)), "bias-free.*got parameters gate_proj.weight, gate"),
        (lambda: moe_layer(Swiglu(activation=F.gelu)), r"silu\(gate\(x\)\).*Swiglu.*% off"),
        (lambda: moe_layer(Swiglu(activation=F.relu)), "% off"),
        (lambda: moe_layer(Swapped()), "Swapped, which .*% off"),
        (lambda: moe_layer(Dropping()), "% off.*dropout"),
        (lambda: moe_layer(Named()), "got parameters first.weight"),
        (lambda: mixed(moe_layer()), "all expert weights trainable or all frozen"),
        (lambda: moe_layer(enable_expert_tensor_parallelism=True), "tensor_parallelism"),
        (lambda: moe_layer().to("meta"), "weights in memory, got meta"),
        (lambda: nn.Linear(4, 4), "expected deepspeed.moe.layer.MoE layers.*got Sequential"),
    ],
)
def test_what_cannot_be_replaced_is_refused_before_anything_is(
    build: Callable[[], nn.Module], message: str
) -> None:
    good = moe_layer()
    model = nn.Sequential(build())
    if "without any" not in message and not isinstance(model[0], nn.Linear):
        model = nn.Sequential(good, *model)
    with pytest.raises(ValueError, match=message):
        replace_deepspeed_experts(model)
    assert not any(isinstance(module, DeepSpeedExperts) for module in model.modules())


def test_sizes_and_repetition_are_refused() -> None:
    class Odd(Swiglu):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = nn.Linear(HIDDEN, 24, bias=False)
            self.up_proj = nn.Linear(HIDDEN, 24, bias=False)
            self.down_proj = nn.Linear(24, HIDDEN, bias=False)

    with pytest.raises(ValueError, match="intermediate size, in FP8: .*16, got 24"):
        replace_deepspeed_experts(moe_layer(Odd()))
    moe = moe_layer(Odd())
    replace_deepspeed_experts(moe, config=FP8Config.bf16())
    with pytest.raises(ValueError, match="replaced already"):
        replace_deepspeed_experts(moe)
    with pytest.raises(ValueError, match="config: expected an FP8Config, got 'fp8'"):
        replace_deepspeed_experts(moe_layer(), config="fp8")  # type: ignore[arg-type]


def test_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'fp8moe\[deepspeed\]'"):
        replace_deepspeed_experts(nn.Linear(4, 4))


# ------------------------------------------------------------------------------------------ AutoEP


def autoep_layer() -> Any:
    """The AutoEP layer that DeepSpeed makes of a Qwen3-MoE block."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(5)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=32,
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
        )
    )
    replacer = AutoEP(model, parse_autoep_config({"enabled": True, "use_grouped_mm": False}))
    (spec,) = replacer.ep_parser()
    replacer.replace_moe_layer(spec, ep_size=1, ep_rank=0)
    layer = model.get_submodule(spec.moe_module_name)
    for p in layer.experts.parameters():
        nn.init.normal_(p, std=2 / p.shape[-1] ** 0.5)
    return layer


def run_autoep(layer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.linspace(-1, 1, HIDDEN)).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def test_autoep_experts_compute_what_deepspeeds_do() -> None:
    x = torch.randn(2, TOKENS, HIDDEN)
    expected = run_autoep(autoep_layer(), x)
    results = {}
    for name, config, bar in (
        ("bf16", FP8Config.bf16(), BF16_DB),
        ("fp8", FP8Config(), FP8_DB),
        ("uncached", FP8Config(cache_weights=False), FP8_DB),
    ):
        layer = autoep_layer()
        parameters = [id(p) for p in layer.parameters()]
        (report,) = replace_deepspeed_experts(layer, config=config)
        assert report[1:] == ("AutoEP", EXPERTS, HIDDEN, INTERMEDIATE)
        assert [id(p) for p in layer.parameters()] == parameters
        results[name] = got = run_autoep(layer, x)
        assert min(sqnr_db(got[key], expected[key]) for key in expected) > bar
    for key, value in results["fp8"].items():
        assert same_bits(results["uncached"][key], value)

    spoilt = autoep_layer()
    replace_deepspeed_experts(spoilt, config=FP8Config.bf16())
    with torch.no_grad():
        w1, w3 = spoilt.experts.w1.clone(), spoilt.experts.w3.clone()
        spoilt.experts.w1.copy_(w3)
        spoilt.experts.w3.copy_(w1)
    bad = run_autoep(spoilt, x)
    assert sqnr_db(bad["y"], expected["y"]) < FP8_DB


def test_autoep_rows_past_the_last_group_are_zero() -> None:
    layer = autoep_layer()
    x, counts = torch.randn(40, HIDDEN).bfloat16(), torch.tensor([8, 0, 16, 8])
    expected = layer.bfloat16().experts(x, counts).detach()
    replace_deepspeed_experts(layer, config=FP8Config.bf16())
    y = layer.experts(x, counts).detach()
    assert y[32:].eq(0).all()
    assert sqnr_db(y, expected) > BF16_DB


def test_autoep_refuses_other_activations() -> None:
    layer = autoep_layer()
    layer.experts.activation = "swiglu_oai"
    with pytest.raises(ValueError, match="expected activation 'swiglu', got 'swiglu_oai'"):
        replace_deepspeed_experts(layer)
