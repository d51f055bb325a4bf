"""Whole models to block-FP8 checkpoints and back, and through transformers' own FP8 loader."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8moe
from fp8moe import testing
from fp8moe.integrations.checkpoint import (
    export_fp8_checkpoint,
    load_fp8_checkpoint,
    model_from_fp8_checkpoint,
)

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

VOCAB = 64
_SIZES: dict[str, Any] = {
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
            **_SIZES, **moe, intermediate_size=256, moe_intermediate_size=128, head_dim=64
        ),
        "qwen3_moe, tied": transformers.Qwen3MoeConfig(
            **_SIZES,
            **moe,
            intermediate_size=256,
            moe_intermediate_size=128,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        "mixtral": transformers.MixtralConfig(**_SIZES, intermediate_size=128, num_local_experts=4),
        "olmoe": transformers.OlmoeConfig(**_SIZES, **moe, intermediate_size=128),
        "deepseek_v3": transformers.DeepseekV3Config(
            **_SIZES,
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


# ------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_export_import_export_gives_the_same_bytes(tmp_path, name, linears):
    options = {"linears": linears, "max_shard_bytes": 150_000}
    export_fp8_checkpoint(build(name), tmp_path / "first", **options)
    first = files(tmp_path / "first")
    assert sum(n.endswith(".safetensors") for n in first) > 2
    for frozen in (False, True):
        model = model_from_fp8_checkpoint(tmp_path / "first", frozen=frozen)
        again = tmp_path / f"again {frozen}"
        export_fp8_checkpoint(model, again, **options)
        assert files(again) == first
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_import_restores_the_function(tmp_path, name):
    """Trainable and frozen imports compute what the exported FP8 model computed, bit for bit."""
    model = build(name)
    export_fp8_checkpoint(model, tmp_path / "out")
    import fp8moe.integrations.huggingface  # noqa: F401

    model.set_experts_implementation("fp8moe")
    trainable = model_from_fp8_checkpoint(tmp_path / "out")
    trainable.set_experts_implementation("fp8moe")
    frozen = model_from_fp8_checkpoint(tmp_path / "out", frozen=True)
    assert torch.equal(logits(trainable), logits(model))
    assert torch.equal(logits(frozen), logits(model))


def test_a_frozen_import_holds_one_byte_a_weight(tmp_path):
    export_fp8_checkpoint(build(), tmp_path / "out")
    model = model_from_fp8_checkpoint(tmp_path / "out", frozen=True)
    experts = model.model.layers[0].mlp.experts
    weights = 3 * 4 * 128 * 128
    held = sum(t.numel() * t.element_size() for t in (*experts.buffers(), *experts.parameters()))
    assert held == weights + weights // 128**2 * 4
    others = [p for n, p in model.named_parameters() if ".experts." in n]
    assert others == []
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_load_into_a_model_that_exists(tmp_path):
    model = build()
    export_fp8_checkpoint(model, tmp_path / "out")
    torch.manual_seed(7)
    other = build(dtype=torch.float32)
    parameters = list(other.parameters())
    load_fp8_checkpoint(other, tmp_path / "out")
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    assert testing.sqnr_db(logits(other), logits(model)) > 25
    expected = fp8moe.quant.dequantize(
        fp8moe.quant.per_block(model.model.layers[1].mlp.experts.down_proj)
    )
    assert torch.equal(other.model.layers[1].mlp.experts.down_proj, expected)


def test_models_of_this_package(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = [
            fp8moe.MoE(fp8moe.Router(128, 4, 2), fp8moe.Experts(4, 128, 128)) for _ in range(2)
        ]
        return nn.Sequential(*layers)

    model = make()
    export_fp8_checkpoint(model, tmp_path / "out")
    names = set(tensors(tmp_path / "out"))
    assert "1.experts.3.up_proj.weight_scale_inv" in names
    assert "0.router.gate.weight" in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    skipped = config["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["0.router.gate", "1.router.gate"]
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_fp8_checkpoint(other, tmp_path / "out")
    x = torch.randn(32, 128)
    assert torch.equal(other[0](x).y, model[0](x).y)


def test_what_others_publish(tmp_path):
    """Scales in BF16 that are no powers of two, matrices of broken blocks, no list of modules."""
    model = build("deepseek_v3")
    export_fp8_checkpoint(model, tmp_path / "out", linears=True)
    path, config = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    stored = safetensors_torch.load_file(path)
    for name in [n for n in stored if n.endswith("_scale_inv")]:
        stored[name] = (stored[name] * 1.1).bfloat16()
    narrow = "model.layers.0.self_attn.q_b_proj.weight"  # (96, 32)
    w = fp8moe.quant.per_block(stored[narrow])
    stored |= {narrow: w.data, f"{narrow}_scale_inv": w.scale.bfloat16()}
    safetensors_torch.save_file(stored, path, metadata={"format": "pt"})
    content = json.loads(config.read_text())
    del content["quantization_config"]["modules_to_not_convert"]
    config.write_text(json.dumps(content))

    frozen = model_from_fp8_checkpoint(tmp_path / "out", frozen=True)
    trainable = model_from_fp8_checkpoint(tmp_path / "out", dtype=torch.float32)
    expected = fp8moe.quant.dequantize(w)
    assert torch.equal(trainable.model.layers[0].self_attn.q_b_proj.weight, expected)
    scale = stored["model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"].float()
    experts = frozen.model.layers[1].mlp.experts
    assert torch.equal(experts.w2.scale[2], scale)
    full = trainable.model.layers[1].mlp.experts.down_proj
    assert torch.equal(full, fp8moe.quant.dequantize(experts.w2))
    export_fp8_checkpoint(frozen, tmp_path / "again")
    again = tensors(tmp_path / "again")
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert torch.equal(again[key].view(torch.uint8), stored[key].view(torch.uint8))


# ---------------------------------------------------------------------------- other people's loader


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_it_dequantized(tmp_path, name, linears):
    """What transformers does without a GPU: it dequantizes. Logits equal our import's, exactly."""
    model = build(name)
    export_fp8_checkpoint(model, tmp_path / "out", linears=linears, max_shard_bytes=150_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.bfloat16,
        output_loading_info=True,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    assert not any(info.values()), info
    ours = model_from_fp8_checkpoint(tmp_path / "out")
    assert torch.equal(logits(theirs), logits(ours))
    assert testing.sqnr_db(logits(theirs), logits(model)) > 20


def test_wrong_scales_would_show(tmp_path):
    """Negative control of the test above: the inverse scale, which the name suggests."""
    model = build()
    export_fp8_checkpoint(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    stored = safetensors_torch.load_file(path)
    wrong = {n: 1 / t if n.endswith("_scale_inv") else t for n, t in stored.items()}
    safetensors_torch.save_file(wrong, path, metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.bfloat16,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    assert testing.sqnr_db(logits(theirs), logits(model)) < 5


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_transformers_loads_it_as_fp8(tmp_path, name, linears, monkeypatch):
    """Its FP8 modules need a GPU to run; that they take every byte can be seen without one."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None)
    export_fp8_checkpoint(build(name), tmp_path / "out", linears=linears)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    frozen = model_from_fp8_checkpoint(tmp_path / "out", frozen=True)
    theirs, ours = model.model.layers[1].mlp.experts, frozen.model.layers[1].mlp.experts
    assert type(theirs).__name__ == "FP8Experts"
    assert torch.equal(theirs.gate_up_proj.view(torch.uint8), ours.w13_data)
    assert torch.equal(theirs.gate_up_proj_scale_inv, ours.w13.scale)
    assert torch.equal(theirs.down_proj.view(torch.uint8), ours.w2_data)
    assert torch.equal(theirs.down_proj_scale_inv, ours.w2.scale)
    stored, loaded = tensors(tmp_path / "out"), model.state_dict()
    linear = "model.layers.1.self_attn.o_proj.weight"
    assert loaded[linear].dtype == stored[linear].dtype
    quantized = linears and stored[linear].shape == (128, 128)
    assert (stored[linear].dtype == torch.float8_e4m3fn) == quantized


# -------------------------------------------------------------------------------- bad input, export


def _with_lora() -> Any:
    model = build()
    fp8moe.freeze_experts(model, lora_rank=8)
    return model


def _with_nan() -> Any:
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    return model


def _meta() -> Any:
    with torch.device("meta"):
        return build()


def _narrow() -> Any:
    config = configs()["qwen3_moe"]
    config.moe_intermediate_size = 96
    return transformers.AutoModelForCausalLM.from_config(config)


def _gelu() -> Any:
    config = configs()["mixtral"]
    config.hidden_act = "gelu"
    return transformers.AutoModelForCausalLM.from_config(config)


def _dense() -> Any:
    return transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3Config(**_SIZES, intermediate_size=128, head_dim=64)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with_lora, r"layers\.0\.mlp\.experts: has low-rank updates; fp8moe\.merge_adapters"),
        (_with_nan, r"layers\.1\.mlp\.experts\.2\.down_proj\.weight: expected finite weights"),
        (_meta, "on the meta device"),
        (_narrow, r"layers\.0\.mlp\.experts: intermediate_size: .* got 96"),
        (_gelu, "fp8moe does not support activation"),
        (_dense, "expected expert layers in Qwen3ForCausalLM, found none"),
    ],
)
def test_models_that_cannot_be_exported(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        export_fp8_checkpoint(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_overwrites_nothing(tmp_path):
    export_fp8_checkpoint(build(), tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(FileExistsError):
        export_fp8_checkpoint(build("mixtral"), tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]


# -------------------------------------------------------------------------------- bad input, import

SCALE = "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv"
WEIGHT = SCALE.removesuffix("_scale_inv")
NORM = "model.norm.weight"


def _drop(name):
    return lambda t: {k: v for k, v in t.items() if k != name}


def _change(name, change):
    return lambda t: {**t, name: change(t[name])}


BROKEN: dict[str, tuple[Any, str]] = {
    "missing scale": (_drop(SCALE), f"{SCALE}: missing, the scale of an FP8 weight"),
    "missing weight": (_drop(WEIGHT), f"{WEIGHT}: missing"),
    "missing norm": (_drop(NORM), f"{NORM}: missing"),
    "unknown tensor": (lambda t: {**t, "extra.weight": torch.ones(2)}, "extra.weight: not in the"),
    "scale left over": (
        lambda t: {**t, f"{NORM}_scale_inv": torch.ones(1, 1)},
        f"{NORM}_scale_inv: not in the model",
    ),
    "BF16 expert": (_change(WEIGHT, lambda w: w.bfloat16()), f"{WEIGHT}: expected dtype F8_E4M3"),
    "scale in FP64": (_change(SCALE, lambda s: s.double()), f"{SCALE}: expected dtype F32 or"),
    "finer scales": (
        _change(SCALE, lambda s: s.repeat_interleave(2, 0).contiguous()),
        rf"{SCALE}: expected shape \(1, 1\) for 128 x 128 blocks",
    ),
    "transposed norm": (_change(NORM, lambda w: w[:64].clone()), rf"{NORM}: expected shape"),
    "integer norm": (_change(NORM, lambda w: w.int()), f"{NORM}: expected torch.bfloat16, got I32"),
    "infinite scale": (_change(SCALE, lambda s: s / 0), f"{SCALE}: expected finite scales"),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_before_anything_is_loaded(tmp_path, case, frozen):
    model = build()
    if frozen:
        fp8moe.freeze_experts(model)
    export_fp8_checkpoint(build(), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    change, message = BROKEN[case]
    stored = change(safetensors_torch.load_file(path))
    safetensors_torch.save_file(stored, path, metadata={"format": "pt"})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_fp8_checkpoint(model, tmp_path / "out")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_another_quantization_and_another_model_are_refused(tmp_path):
    export_fp8_checkpoint(build(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weight_block_size: expected \[128, 128\]"):
        model_from_fp8_checkpoint(tmp_path / "out")
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="got a checkpoint without one"):
        load_fp8_checkpoint(build(), tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
        load_fp8_checkpoint(build(), tmp_path / "out")
    export_fp8_checkpoint(build(), tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"does not fit the model:\n.*missing(.*\n)+ *and \d+ more"
    ):
        load_fp8_checkpoint(build("mixtral"), tmp_path / "other")


@pytest.mark.gpu
def test_import_straight_to_the_gpu(tmp_path):
    pytest.importorskip("accelerate")
    model = build()
    export_fp8_checkpoint(model.cuda(), tmp_path / "out")
    export_fp8_checkpoint(model.cpu(), tmp_path / "from the CPU")
    assert files(tmp_path / "out") == files(tmp_path / "from the CPU")
    frozen = model_from_fp8_checkpoint(tmp_path / "out", frozen=True, device="cuda")
    assert all(t.is_cuda for t in (*frozen.parameters(), *frozen.buffers()))
    on_cpu = model_from_fp8_checkpoint(tmp_path / "out", frozen=True)
    ids = torch.arange(48).reshape(2, 24) % VOCAB
    with torch.no_grad():
        out = frozen.eval()(ids.cuda()).logits.cpu()
    assert testing.sqnr_db(out, logits(on_cpu)) > 20


def test_meta_tensors_need_a_device_and_a_value(tmp_path):
    export_fp8_checkpoint(build(), tmp_path / "out")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(configs()["qwen3_moe"])
    with pytest.raises(ValueError, match="device: expected one"):
        load_fp8_checkpoint(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"inv_freq: is on the meta device and not in a check"):
        load_fp8_checkpoint(model, tmp_path / "out", device="cpu")
