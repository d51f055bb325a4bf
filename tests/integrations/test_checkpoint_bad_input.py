"""Models that cannot be exported, and checkpoints that cannot be loaded."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from checkpoint_models import build, files, safetensors_torch
from tiny_models import SIZES, transformers

import fp8moe
from fp8moe.integrations.checkpoint import (
    export_fp8_checkpoint,
    load_fp8_checkpoint,
    model_from_fp8_checkpoint,
)

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
    return build(moe_intermediate_size=96)


def _gelu() -> Any:
    return build("mixtral", hidden_act="gelu")


def _dense() -> Any:
    return transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3Config(**SIZES, num_hidden_layers=2, head_dim=64)
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


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    """The disk is full at the second file."""
    written = []
    save_file = safetensors_torch.save_file

    def full(tensors, path, **options):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_fp8_checkpoint(build(), tmp_path / "out", max_shard_bytes=200_000)
    assert written and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, "5GB", 1e9])
def test_a_wrong_file_size_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match="max_shard_bytes: expected a positive integer, got"):
        export_fp8_checkpoint(build(), tmp_path / "out", max_shard_bytes=limit)
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
    config["quantization_config"] = ["fp8"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantization_config: .* got \['fp8'\]"):
        load_fp8_checkpoint(build(), tmp_path / "out")
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


@pytest.mark.parametrize("cut", ["config.json", "index", "shard", "empty shard"])
def test_files_that_are_cut_off_are_named(tmp_path, cut):
    folder = tmp_path / "out"
    export_fp8_checkpoint(build(), folder, max_shard_bytes=200_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    path = {"config.json": folder / cut, "index": folder / "model.safetensors.index.json"}
    path = path.get(cut, shard)
    content = path.read_bytes()
    path.write_bytes(b"" if cut == "empty shard" else content[:-10])
    with pytest.raises(ValueError, match=rf"{path.name}: not a whole (JSON|safetensors) file"):
        load_fp8_checkpoint(build(), folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]"])
def test_an_index_that_says_nothing_is_refused(tmp_path, content):
    folder = tmp_path / "out"
    export_fp8_checkpoint(build(), folder, max_shard_bytes=200_000)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: expected a (weight_map|JSON object)"):
        load_fp8_checkpoint(build(), folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float8_e4m3fn}, "dtype: expected one of torch.bfloat16"),
        ({"dtype": torch.int32}, "dtype: expected one of torch.bfloat16"),
        ({"keep_transpose": True}, "keep_transpose: is for frozen experts, but frozen=False"),
        ({"config": fp8moe.FP8Config()}, "config: is for frozen experts, but frozen=False"),
    ],
)
def test_settings_of_an_import_that_cannot_be(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        model_from_fp8_checkpoint(tmp_path / "not read", **arguments)


def test_meta_tensors_need_a_device_and_a_value(tmp_path):
    export_fp8_checkpoint(build(), tmp_path / "out")
    model = _meta()
    with pytest.raises(ValueError, match="device: expected one"):
        load_fp8_checkpoint(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"inv_freq: is on the meta device and not in a check"):
        load_fp8_checkpoint(model, tmp_path / "out", device="cpu")
