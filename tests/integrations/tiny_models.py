"""Small Hugging Face models with random weights, and how far apart two of their runs are."""

from __future__ import annotations

import importlib

import pytest
import torch

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
        **{"first_k_dense_replace": 0, **kw}, n_routed_experts=E, moe_intermediate_size=I,
        n_group=4, topk_group=2, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32,
    ),
}  # fmt: skip


def config(kind="qwen3_moe", layers=1, **changes):
    return CONFIGS[kind](**{**SIZES, "num_hidden_layers": layers, **changes})


def build(kind="qwen3_moe", layers=1, implementation="fp8moe", dtype=None, **changes):
    return transformers.AutoModelForCausalLM.from_config(
        config(kind, layers, **changes), experts_implementation=implementation, dtype=dtype
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
