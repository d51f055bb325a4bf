"""Tiny models of transformers, their logits, and the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
safetensors_torch = pytest.importorskip("safetensors.torch")

VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def configs() -> dict[str, Any]:
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    return {
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **SIZES, **moe, intermediate_size=256, moe_intermediate_size=128, head_dim=64
        ),
        "qwen3_moe, tied": transformers.Qwen3MoeConfig(
            **SIZES,
            **moe,
            intermediate_size=256,
            moe_intermediate_size=128,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        "mixtral": transformers.MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=4),
        "olmoe": transformers.OlmoeConfig(**SIZES, **moe, intermediate_size=128),
        "deepseek_v3": transformers.DeepseekV3Config(
            **SIZES,
            intermediate_size=256,
            moe_intermediate_size=128,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
        ),
    }


NAMES = ["qwen3_moe", "qwen3_moe, tied", "mixtral", "olmoe", "deepseek_v3"]


def build(name: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(configs()[name], dtype=dtype)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):  # as from_pretrained has it, and not zero
            module = model.get_submodule(key.rpartition(".")[0])
            module.e_score_correction_bias = torch.linspace(0, 0.1, buffer.numel())
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24) % VOCAB
    with torch.no_grad():
        return model.eval()(ids).logits


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(safetensors_torch.load_file(path))
    return found
