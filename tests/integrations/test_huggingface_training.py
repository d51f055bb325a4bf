"""fp8moe experts with what people put on top: Trainer, PEFT, compile, checkpoints, parallelism."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (
    CONFIGS,
    LOGITS_DB,
    SIZES,
    E,
    H,
    I,
    K,
    build,
    failures,
    run,
    tokens,
    transformers,
)

import fp8moe
from fp8moe import testing


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
    assert re.match("biases, transposed .*, interleaved .*, a gating", report.left[0].reason)
    assert report.left[0].kind == "GptOssExperts"


# ------------------------------------------------------------------------------ several processes


@pytest.mark.dist
@pytest.mark.slow
def test_expert_parallelism_of_transformers(tmp_path, device):
    """Each of two processes holds half of the experts and drops the other half's slots."""
    from transformers.distributed import DistributedConfig

    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if "tp_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("this transformers shards experts in another way than as DTensors")
    build().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(device)
    ids = tokens(device)
    torch.save(ids, tmp_path / "ids.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    worker = Path(__file__).with_name("expert_parallel_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         worker, *(tmp_path / name for name in ("model", "ids.pt", "result.pt")), device.type],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt", map_location=device)
    assert result["local"] == E // 2
    dropped = (result["ids"] == E // 2).float().mean()
    assert 0.2 < dropped < 0.8  # the sentinel was really there
    logits, grads = run(model, "fp8moe", ids)
    # One process sums a token's experts in FP32, two round their part to the model's dtype.
    parallel = result["logits"], result["grads"]
    assert not failures(parallel, (logits, grads), gates=(40.0, 40.0, 30.0))
    assert failures(parallel, run(model, "eager", ids), gates=(40.0, 40.0, 30.0))
