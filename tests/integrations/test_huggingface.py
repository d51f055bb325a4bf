"""fp8moe inside Hugging Face models: against their eager experts, and with what goes on top."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fp8moe
from fp8moe import testing
from fp8moe.config import FP8Config

transformers = pytest.importorskip("transformers")
huggingface = importlib.import_module("fp8moe.integrations.huggingface")

BF16 = huggingface.register(FP8Config.bf16(), name="fp8moe_bf16")
E, K, H, I = 8, 2, 128, 128  # noqa: E741
LOGITS_DB, EXPERTS_DB, OTHERS_DB = 22.0, 22.0, 18.0
"""Gates on logits, gradients of the experts' weights and all other gradients of a model with one
FP8 expert layer, against FP32."""

SIZES = {
    "hidden_size": H, "intermediate_size": I, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 64, "num_experts_per_tok": K, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda **kw: transformers.MixtralConfig(**kw, num_local_experts=E),
    "qwen3_moe": lambda **kw: transformers.Qwen3MoeConfig(
        **{"moe_intermediate_size": I, **kw}, num_experts=E, head_dim=64
    ),
    "olmoe": lambda **kw: transformers.OlmoeConfig(**kw, num_experts=E),
    "deepseek_v3": lambda **kw: transformers.DeepseekV3Config(
        **kw, n_routed_experts=E, moe_intermediate_size=I, n_group=4, topk_group=2,
        first_k_dense_replace=0, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=32,
    ),
}  # fmt: skip


def config(kind="qwen3_moe", layers=1, **changes):
    return CONFIGS[kind](**{**SIZES, "num_hidden_layers": layers, **changes})


def build(kind="qwen3_moe", layers=1, implementation="fp8moe", **changes):
    return transformers.AutoModelForCausalLM.from_config(
        config(kind, layers, **changes), experts_implementation=implementation
    )


def tokens(device="cpu", batch=2, length=48):
    return torch.randint(SIZES["vocab_size"], (batch, length), device=device)


def run(model, implementation, ids):
    """Logits and all gradients."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


def failures(result, reference, gates=(LOGITS_DB, EXPERTS_DB, OTHERS_DB)):
    """What misses its gate, with its SQNR in dB."""
    found = {"logits": (testing.sqnr_db(result[0], reference[0]), gates[0])}
    assert result[1].keys() == reference[1].keys()
    for name, grad in result[1].items():
        routed = name.endswith(("gate_up_proj", "experts.down_proj"))
        found[name] = testing.sqnr_db(grad, reference[1][name]), gates[1 if routed else 2]
    return {name: db for name, (db, gate) in found.items() if not db > gate}


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
    eager = run(model, "eager", ids)
    with torch.autocast(device.type, torch.bfloat16):
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
    "DeepseekV4Experts": "a gating function of its own",
    "Glm5NextTextExperts": "a gating function of its own",
    "GptOssExperts": "biases, transposed weights .*, interleaved .*, a gating function of its own",
    "HYV4Experts": "a gating function of its own",
    "MiniMaxM3VLExperts": "a gating function of its own",
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


def test_other_activations_are_refused_by_name():
    model = build("mixtral", hidden_act="gelu")
    with pytest.raises(ValueError, match="MixtralExperts: fp8moe does not support activation GELU"):
        model(tokens())


def test_refused_before_any_work(monkeypatch):
    gpt_oss = transformers.GptOssConfig(
        **SIZES, num_hidden_layers=1, num_local_experts=E, head_dim=64
    )
    model = transformers.AutoModelForCausalLM.from_config(gpt_oss, experts_implementation="fp8moe")
    monkeypatch.setattr("fp8moe.modules.stacked.swiglu_experts", None)
    with pytest.raises(ValueError, match="GptOssExperts: fp8moe does not support biases"):
        model(tokens())


def test_sizes_that_the_gemms_cannot_take_are_refused():
    model = build(moe_intermediate_size=136)
    with pytest.raises(ValueError, match="w2: I, in FP8: expected a multiple of 16, got 136"):
        model(tokens())
    model.set_experts_implementation(BF16)
    model(tokens())


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


# ----------------------------------------------------------------------------------- what is on top


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_from_pretrained(tmp_path, kind):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="fp8moe"
    )
    assert loaded.config._experts_implementation == "fp8moe"
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    eager = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="eager"
    )
    assert not torch.equal(eager(ids).logits, model(ids).logits)


def test_gradient_checkpointing_changes_nothing():
    model = build(layers=2)
    ids = tokens()
    expected = run(model, "fp8moe", ids)
    model.gradient_checkpointing_enable()
    model.train()
    calls = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    result = run(model, "fp8moe", ids)
    assert len(calls) == 2
    assert torch.equal(result[0], expected[0])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in result[1].items())


def test_compiles_as_one_graph(device):
    model = build(layers=2).to(device)
    ids = tokens(device)
    expected = run(model, "fp8moe", ids)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(input_ids=ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits.detach(), expected[0], rtol=1e-4, atol=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[1][name], rtol=1e-3, atol=1e-4)


class Stream(torch.utils.data.Dataset):
    """Counting modulo the vocabulary: learned in a few steps."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = (torch.arange(32) + 7 * i) % SIZES["vocab_size"]
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    model = build(layers=2, initializer_range=0.02)
    before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=5e-3,
        logging_steps=1, report_to=[], use_cpu=True, save_steps=12, bf16=True,
        gradient_checkpointing=checkpointing, gradient_accumulation_steps=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Stream())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0], losses
    assert not torch.equal(model.model.layers[1].mlp.experts.down_proj, before)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert torch.equal(
        saved.model.layers[1].mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj
    )


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ],
    ids=["attention", "experts"],
)
def test_peft(targets):
    peft = pytest.importorskip("peft")
    model = build()
    lora = peft.LoraConfig(r=4, init_lora_weights=False, **targets)
    wrapped = peft.get_peft_model(model, lora)
    ids = tokens()

    def step(implementation):
        model.set_experts_implementation(implementation)
        wrapped.zero_grad()
        output = wrapped(input_ids=ids, labels=ids)
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
        return output.logits.detach(), grads

    eager, result = step("eager"), step("fp8moe")
    assert result[1] and all("lora_" in name for name in result[1])
    assert not failures(result, eager, gates=(20.0, 20.0, 18.0))
    plain = build()
    plain.load_state_dict(model.state_dict(), strict=False)
    merged = wrapped.merge_and_unload()
    assert testing.sqnr_db(merged(ids).logits.detach(), result[0]) > 20


# ------------------------------------------------------------------------------- replace_experts


@pytest.mark.parametrize("kind", CONFIGS)
def test_replace_experts(tmp_path, kind):
    model = build(kind, layers=2, implementation="eager")
    ids = tokens()
    expected = run(model, "fp8moe", ids)
    parameters = dict(model.named_parameters())
    report = fp8moe.replace_experts(model)
    assert len(report.replaced) == 2 and not report.left
    result = run(model, "eager", ids)  # the implementation no longer matters
    assert torch.equal(result[0], expected[0])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in result[1].items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="fp8moe"
    )
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


class OldBlock(torch.nn.Module):
    """What models outside the interface have: a loop over a ModuleList."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(H, E, bias=False)
        self.experts = torch.nn.ModuleList(OldExpert() for _ in range(E))
        self.top_k = K

    def forward(self, x):
        weights, ids = self.gate(x).float().softmax(-1).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + (weights * (ids == e)).sum(-1, keepdim=True) * expert(x)
        return y


class OldExpert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (torch.nn.Linear(H, I, bias=False) for _ in range(2))
        self.w2 = torch.nn.Linear(I, H, bias=False)

    def forward(self, x):
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


class OldModel(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.moe = OldBlock()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)

    def forward(self, x):
        return self.moe(x)


def test_checkpoints_of_models_outside_the_interface(tmp_path):
    model = OldModel(transformers.PretrainedConfig())
    x = torch.randn(2, 16, H)
    expected = model(x).detach()
    model.save_pretrained(tmp_path / "old")
    assert len(fp8moe.replace_experts(model).replaced) == 1
    assert testing.sqnr_db(model(x).detach(), expected) > LOGITS_DB
    model.save_pretrained(tmp_path / "new")
    loaded = OldModel.from_pretrained(tmp_path / "new")  # the old class reads it
    assert torch.equal(loaded(x), OldModel.from_pretrained(tmp_path / "old")(x))
    assert torch.allclose(loaded(x), expected, atol=1e-6)


def test_replace_experts_leaves_what_it_cannot_do():
    gpt_oss = transformers.GptOssConfig(
        **SIZES, num_hidden_layers=1, num_local_experts=E, head_dim=64
    )
    model = transformers.AutoModelForCausalLM.from_config(gpt_oss)
    report = fp8moe.replace_experts(model)
    assert not report.replaced
    assert re.match(REFUSED["GptOssExperts"], report.left[0].reason)
    assert report.left[0].kind == "GptOssExperts"


# ------------------------------------------------------------------------------ several processes


@pytest.mark.dist
@pytest.mark.slow
def test_expert_parallelism_of_transformers(tmp_path):
    """Each of two processes holds half of the experts and drops the other half's slots."""
    build().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokens()
    torch.save(ids, tmp_path / "ids.pt")
    worker = Path(__file__).with_name("expert_parallel_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         worker, tmp_path / "model", tmp_path / "ids.pt", tmp_path / "result.pt"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt")
    assert result["local"] == E // 2
    dropped = (result["ids"] == E // 2).float().mean()
    assert 0.2 < dropped < 0.8  # the sentinel was really there
    logits, grads = run(model, "fp8moe", ids)
    # One process sums a token's experts in FP32, two round their part to the model's dtype.
    parallel = result["logits"], result["grads"]
    assert not failures(parallel, (logits, grads), gates=(40.0, 40.0, 30.0))
    assert failures(parallel, run(model, "eager", ids), gates=(40.0, 40.0, 30.0))
