"""The experts implementation fp8moe: against eager experts, and what it refuses."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    BF16,
    CONFIGS,
    LOGITS_DB,
    SIZES,
    E,
    H,
    I,
    K,
    build,
    failures,
    huggingface,
    run,
    tokens,
    transformers,
)

import fp8moe
from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.modules import stacked


@pytest.mark.parametrize("kind", CONFIGS)
def test_results_are_those_of_the_eager_experts(device, kind):
    model = build(kind).to(device)
    ids = tokens(device)
    eager = run(model, "eager", ids)
    assert not failures(run(model, BF16, ids), eager, gates=(35.0, 38.0, 33.0))
    assert not failures(run(model, "fp8moe", ids), eager)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_planted_error_fails_the_gates(device, kind):
    model = build(kind).to(device)
    ids = tokens(device)
    eager = run(model, "eager", ids)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if name.endswith("gate_up_proj"):
                w[0, I:].neg_()
    failed = failures(run(model, "fp8moe", ids), eager)
    assert "logits" in failed
    assert sum(name.endswith("_proj") and "experts" in name for name in failed) >= 2


def test_bf16_models(device):
    model = build().to(device, torch.bfloat16)
    ids = tokens(device)
    eager = run(model, "eager", ids)
    result = run(model, "fp8moe", ids)
    assert result[0].dtype == torch.bfloat16
    assert not failures(result, eager, gates=(20.0, 20.0, 15.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_hidden_states_comes_back_also_under_autocast(device, dtype):
    experts = build().model.layers[0].mlp.experts.to(device)
    x = torch.randn(10, H, device=device, dtype=dtype)
    ids, weights = testing.random_topk(10, K, E, 0, device=device)
    assert experts(x, ids, weights.to(dtype)).dtype == dtype
    with torch.autocast(device.type, torch.bfloat16):
        assert experts(x, ids, weights.to(dtype)).dtype == dtype


def test_autocast(device):
    model = build().to(device)
    ids = tokens(device)
    with torch.autocast(device.type, torch.bfloat16):
        eager = run(model, "eager", ids)
        result = run(model, "fp8moe", ids)
    assert result[1]["model.layers.0.mlp.experts.down_proj"].dtype == torch.float32
    assert not failures(result, eager, gates=(20.0, 20.0, 15.0))


# --------------------------------------------------------------------------------- other classes


def interface_classes():
    """Every experts class of transformers that uses the interface: (module, name)."""
    found = []
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        pattern = r"@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)"
        for name in re.findall(pattern, file.read_text(encoding="utf-8")):
            found.append((f"transformers.models.{file.parent.name}.{file.stem}", name))
    return found


REFUSED = {
    "GptOssExperts": "biases, transposed weights .*, interleaved .*, a gating function of its own",
    "NemotronHExperts": "experts without a gate projection",
    "OpenAIPrivacyFilterExperts": "biases, transposed weights .*, a gating function of its own",
}


def any_config(**changes):
    """Every name under which a model's config has these sizes."""
    sizes = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E)
    sizes |= dict.fromkeys(("moe_num_experts",), E) | {"hidden_size": H, "moe_latent_size": None}
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), I)
    acts = dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu")
    limits = {"swiglu_limit": 7.0, "swiglu_alpha": 1.7, "mlp_bias": False}
    implementation = {"_experts_implementation": BF16}
    return SimpleNamespace(**{**sizes, **acts, **limits, **implementation, **changes})


def test_every_class_of_the_interface_works_or_is_refused_by_name():
    x = torch.randn(12, H)
    ids, weights = testing.random_topk(12, K, E, 0)
    refused = {}
    classes = interface_classes()
    for module, name in classes:
        settings = any_config()
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError as error:  # a model whose own extras are not installed
            pytest.fail(f"{module}: {error}")
        experts = kind(settings)
        for p in experts.parameters():
            torch.nn.init.normal_(p, std=0.1)
        settings._experts_implementation = "eager"
        expected = experts(x, ids, weights)
        settings._experts_implementation = BF16
        try:
            y = experts(x, ids, weights)
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert testing.sqnr_db(y.detach(), expected.detach()) > 40, name
    assert len(classes) - len(refused) >= 30
    assert set(refused) <= set(REFUSED), refused
    for name, message in refused.items():
        assert re.match(f"{name}: fp8moe does not support {REFUSED[name]}", message), message


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
def test_other_activations(device, kind, save):
    model = build(kind, hidden_act="gelu").to(device)
    ids = tokens(device)
    eager = run(model, "eager", ids)
    assert not failures(run(model, BF16, ids), eager, gates=(35.0, 38.0, 33.0))
    name = huggingface.register(FP8Config(save=save), name="fp8moe_test")
    assert not failures(run(model, name, ids), eager)
    silu = run(build(kind).to(device), "eager", ids)
    assert "logits" in failures(run(model, name, ids), silu)


def test_a_gate_of_the_class_itself(device, monkeypatch):
    """One that is not zero for zeros: padding, of rows and of I, must not show."""

    def shifted(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * torch.sigmoid(1.7 * gate) * (up + 1) + 1

    model = build(moe_intermediate_size=40).to(device)
    ids = tokens(device)
    swiglu = run(model, "eager", ids)
    kind = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "_apply_gate", shifted)
    expected = run(model, "batched_mm", ids)
    assert not failures(run(model, BF16, ids), expected, gates=(35.0, 38.0, 33.0))
    assert not failures(run(model, "fp8moe", ids), expected)
    assert "logits" in failures(swiglu, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_which_gate_a_module_has_is_seen_at_the_module(compiled):
    """The class's default, a gate of one module alone, a module that only passes attributes on."""

    def twice(self, gate_up):
        return 2 * gate_up.chunk(2, dim=-1)[0]

    default, own = (build().model.layers[0].mlp.experts for _ in range(2))
    own._apply_gate = types.MethodType(twice, own)
    assert stacked._gate(torch.compile(default)) is None

    def is_swiglu(experts, x):
        return x + (1 if stacked._gate(experts) is None else 0)

    seen = torch.compile(is_swiglu, fullgraph=True, backend="eager") if compiled else is_swiglu
    assert seen(default, torch.zeros(1)) == 1 and seen(own, torch.zeros(1)) == 0
    assert stacked.unsupported(default) is None and "of its own" in stacked.unsupported(own)


def test_other_gates_compile_and_checkpoint():
    name = huggingface.register(FP8Config(save="recompute"), name="fp8moe_test")
    model = build(hidden_act="gelu")
    ids = tokens()
    expected = run(model, name, ids)
    model.gradient_checkpointing_enable()
    model.train()
    again = run(model, name, ids)
    assert all(torch.equal(again[1][key], grad) for key, grad in expected[1].items())
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids).logits, expected[0])


def test_replaced_and_frozen_experts_are_swiglu():
    model = build("mixtral", hidden_act="gelu")
    report = fp8moe.replace_experts(model)
    assert not report.replaced and "activation GELU" in report.left[0].reason
    with pytest.raises(ValueError, match="activation GELU"):
        fp8moe.freeze_experts(model)


def test_refused_before_any_work(monkeypatch):
    gpt_oss = transformers.GptOssConfig(
        **SIZES, num_hidden_layers=1, num_local_experts=E, head_dim=64
    )
    model = transformers.AutoModelForCausalLM.from_config(gpt_oss, experts_implementation="fp8moe")
    monkeypatch.setattr("fp8moe.modules.stacked.gated_experts", None)
    with pytest.raises(ValueError, match="GptOssExperts: fp8moe does not support biases"):
        model(tokens())


@pytest.mark.parametrize("intermediate", [136, 37])
def test_any_intermediate_size(device, intermediate):
    """Tensor parallelism and tiny models have sizes that no FP8 GEMM takes."""
    model = build(moe_intermediate_size=intermediate).to(device)
    ids = tokens(device)
    eager = run(model, "eager", ids)
    assert not failures(run(model, BF16, ids), eager, gates=(35.0, 38.0, 33.0))
    assert not failures(run(model, "fp8moe", ids), eager)
    assert len(fp8moe.replace_experts(model).replaced) == 1


def test_padding_at_the_wrong_rows_fails_the_gates(monkeypatch):
    def pad_the_end(w13, w2, unit):
        short = -w2.shape[2] % unit
        pad = torch.nn.functional.pad
        return pad(w13, (0, 0, 0, 2 * short)), pad(w2, (0, short))

    model = build(moe_intermediate_size=136)
    ids = tokens()
    eager = run(model, "eager", ids)
    monkeypatch.setattr("fp8moe.modules.stacked._padded", pad_the_end)
    assert "logits" in failures(run(model, "fp8moe", ids), eager)


def test_padded_weights_cannot_have_a_main_grad():
    model = build(moe_intermediate_size=136)
    weight = model.model.layers[0].mlp.experts.down_proj
    weight.main_grad = torch.zeros(weight.shape)
    with pytest.raises(ValueError, match=r"down_proj.main_grad: .*multiple of 16, got 136"):
        model(tokens())


def test_a_hidden_size_that_the_gemms_cannot_take_is_refused():
    model = build(hidden_size=136)
    with pytest.raises(ValueError, match="x: H, in FP8: expected a multiple of 16, got 136"):
        model(tokens())
    model.set_experts_implementation(BF16)
    model(tokens())


@pytest.mark.parametrize("implementation", ["fp8moe", BF16])
def test_on_the_meta_device(implementation):
    with torch.device("meta"):
        model = build(implementation=implementation)
    output = model(input_ids=tokens("meta"), labels=tokens("meta"))
    output.loss.backward()
    assert output.logits.is_meta and model.model.layers[0].mlp.experts.down_proj.grad.is_meta


def test_fp8_weights_of_transformers_are_refused():
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = build(implementation="eager")
    settings = transformers.FineGrainedFP8Config()
    model = replace_with_fp8_linear(model, ["lm_head", "gate"], settings)
    model.set_experts_implementation("fp8moe")
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"FP8Experts: .*FineGrainedFP8Config\(dequantize=True\)"):
        experts(torch.randn(4, H), *testing.random_topk(4, K, E, 0))


# ---------------------------------------------------------------------- sentinel, registration


def test_the_sentinel_of_expert_parallelism_gives_zero_rows(device):
    experts = build().model.layers[0].mlp.experts.to(device)
    torch.nn.init.normal_(experts.gate_up_proj, std=0.1)
    torch.nn.init.normal_(experts.down_proj, std=0.1)
    x = torch.randn(40, H, device=device, requires_grad=True)
    ids, weights = testing.random_topk(40, K, E, 3, dropped=0.5, device=device)
    ids[:4] = E
    ids[4:8] = torch.tensor([[0, E]], device=device)
    weights.requires_grad_()
    y = experts(x, ids, weights)
    y.backward(torch.randn_like(y))
    nothing = (ids == E).all(dim=1)
    assert not y[nothing].any() and not x.grad[nothing].any()
    assert not weights.grad[ids == E].any()
    some = ~nothing
    assert y[some].abs().amax(1).min() > 0 and weights.grad[ids != E].abs().min() > 0

    got = x.grad.clone(), experts.down_proj.grad.clone()
    experts.zero_grad()
    x.grad = None
    kept = weights.detach().masked_fill(ids == E, 0.0)
    experts.config._experts_implementation = "eager"
    expected = experts(x, ids.clamp(max=E - 1), kept)
    expected.backward(torch.ones_like(expected))
    assert testing.sqnr_db(y.detach(), expected.detach()) > LOGITS_DB
    assert got[0][some].abs().amax(1).min() > 0 and got[1].abs().sum() > 0


def test_a_registered_config_is_what_runs():
    model = build()
    ids = tokens()
    expected = run(model, "fp8moe", ids)[0]
    fprop = FP8Config(fprop="bf16")
    assert huggingface.register(fprop, name="fp8moe_test") == "fp8moe_test"
    assert not torch.equal(run(model, "fp8moe_test", ids)[0], expected)
    assert torch.equal(run(model, "fp8moe_test", ids)[0], run(model, BF16, ids)[0])
    huggingface.register(name="fp8moe_test")
    assert torch.equal(run(model, "fp8moe_test", ids)[0], expected)
    fp32_scales = huggingface.register(FP8Config(pow2_scales=False), name="fp8moe_test")
    assert not torch.equal(run(model, fp32_scales, ids)[0], expected)


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_names_of_transformers_are_not_overwritten(name):
    with pytest.raises(ValueError, match=f"name: '{name}' is an implementation of transformers"):
        huggingface.register(name=name)


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_wrong_name_is_refused(name):
    with pytest.raises(ValueError, match=f"name: expected a string, got {name!r}"):
        huggingface.register(name=name)


def test_a_wrong_config_is_refused():
    with pytest.raises(ValueError, match="config: expected an FP8Config, got 'bf16'"):
        huggingface.register("bf16")


def test_missing_or_old_transformers(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.6.2")
    with pytest.raises(ImportError, match=r"expected 5.7 or newer, got 5.6.2.*fp8moe\[hf\]"):
        huggingface.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'fp8moe\[hf\]'"):
        huggingface.register()
