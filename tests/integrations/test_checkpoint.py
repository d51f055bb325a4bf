"""Whole models to block-FP8 checkpoints and back, and through transformers' own FP8 loader."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_models import NAMES, VOCAB, build, files, logits, safetensors_torch, tensors
from tiny_models import E, H, I, transformers
from torch import nn

import fp8moe
from fp8moe import testing
from fp8moe.integrations.checkpoint import (
    export_fp8_checkpoint,
    load_fp8_checkpoint,
    model_from_fp8_checkpoint,
)

# ------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_transformers_own_checkpoints(tmp_path, name):
    """In every supported version: what it renames and splits when it saves differs from one to
    the next."""
    model = build(name)
    model.save_pretrained(tmp_path / "theirs")
    export_fp8_checkpoint(model, tmp_path / "ours")
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    ours = {n: t for n, t in ours.items() if not n.endswith("_scale_inv")}
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


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
    weights = 3 * E * H * I
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


def _drops_scales() -> bool:
    """Older versions load such experts without their scales, whoever wrote the checkpoint."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 10)


@pytest.mark.skipif(_drops_scales(), reason="transformers < 5.10 cannot dequantize experts")
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


@pytest.mark.skipif(_drops_scales(), reason="transformers < 5.10 cannot dequantize experts")
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


@pytest.mark.gpu
def test_import_straight_to_the_gpu(tmp_path):
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
