"""Low-rank updates of frozen experts in transformers models: training, files, PEFT."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import checkpoint_models
import pytest
import torch
from checkpoint_models import VOCAB, safetensors_torch
from tiny_models import E, transformers
from torch import nn

import fp8moe
from fp8moe import testing
from fp8moe.integrations.adapters import load_adapters, save_adapters
from fp8moe.integrations.checkpoint import export_fp8_checkpoint, model_from_fp8_checkpoint


def build(kind: str = "qwen3_moe", **changes: Any) -> Any:
    """The same weights in every call."""
    torch.manual_seed(0)
    return checkpoint_models.build(kind, **changes)


def tokens() -> torch.Tensor:
    return torch.arange(64).reshape(2, 32) * 7 % VOCAB


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def with_updates(seed: int = 3, kind: str = "qwen3_moe", **options: Any) -> Any:
    model = build(kind)
    fp8moe.freeze_experts(model, **{"lora_rank": 8, **options})
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fine_tuning_lowers_the_loss(checkpointing):
    model = build()
    fp8moe.freeze_experts(model, lora_rank=8, lora_alpha=16.0)
    fp8moe.train_only_adapters(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05)
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = with_updates().train()
        fp8moe.train_only_adapters(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    pairs = list(zip(gradients(False), gradients(True), strict=True))
    assert len(pairs) == 8
    assert all(a.any() and torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore")
def test_trainer_with_peft_on_attention(tmp_path):
    """PEFT first, which freezes all but its own; then the experts, whose updates train."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build(dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    fp8moe.freeze_experts(model, lora_rank=8)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(".experts." in n for n in trainable) == 8
    assert sum(".self_attn." in n for n in trainable) == 8
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": t, "labels": t} for t in tokens()]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trainable
    save_adapters(model, tmp_path / "experts")  # without PEFT's own
    other = with_updates()
    load_adapters(other, tmp_path / "experts")
    mine = model.get_base_model().model.layers[1].mlp.experts.w2_lora.lora_B
    assert torch.equal(other.model.layers[1].mlp.experts.w2_lora.lora_B, mine)


def test_merged_adapters_export_and_come_back(tmp_path):
    model = with_updates()
    expected = logits(model)
    plain = logits(with_updates(lora_alpha=1e-9))
    assert testing.sqnr_db(plain, expected) < 15
    assert fp8moe.merge_adapters(model) == 2
    export_fp8_checkpoint(model, tmp_path / "merged")
    again = model_from_fp8_checkpoint(tmp_path / "merged", frozen=True)
    assert torch.equal(logits(again), logits(model))
    assert testing.sqnr_db(logits(again), expected) > 20


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_round_trip(tmp_path, kind):
    model = with_updates(3, kind)
    save_adapters(model, tmp_path / "adapter")
    other = with_updates(4, kind)
    assert not torch.equal(logits(other), logits(model))
    load_adapters(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    save_adapters(other, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, again = tmp_path / "adapter" / name, tmp_path / "again" / name
        assert first.read_bytes() == again.read_bytes()


def test_only_updates_are_in_the_file(tmp_path):
    model = with_updates()
    save_adapters(model, tmp_path / "adapter")
    stored = safetensors_torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * E * 3 * 2  # layers, experts, projections, A and B
    key = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight"
    update = model.model.layers[1].mlp.experts.w13_lora
    assert torch.equal(stored[key], update.lora_B[2, 128:])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16.0)
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same_from_it(tmp_path):
    """PEFT puts the file's updates on transformers' own experts."""
    peft = pytest.importorskip("peft")
    model = with_updates()
    save_adapters(model, tmp_path / "adapter")
    base = build()
    with torch.no_grad():
        for theirs, ours in zip(base.model.layers, model.model.layers, strict=True):
            for weight, name in (("gate_up_proj", "w13"), ("down_proj", "w2")):
                values = fp8moe.quant.dequantize(getattr(ours.mlp.experts, name))
                getattr(theirs.mlp.experts, weight).copy_(values)
    without = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert testing.sqnr_db(without, logits(model)) < 15
    assert testing.sqnr_db(adapted, logits(model)) > 25


def test_nothing_is_overwritten(tmp_path):
    save_adapters(with_updates(), tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        save_adapters(with_updates(4), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


GATE_A = "base_model.model.model.layers.0.mlp.experts.1.gate_proj.lora_A.weight"
DOWN_B = "base_model.model.model.layers.1.mlp.experts.0.down_proj.lora_B.weight"


def _drop(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in t.items() if k != DOWN_B}


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "1 tensors missing, such as .*down_proj.lora_B"),
        (lambda t: {**t, "more": torch.ones(1)}, "1 tensors not in the model, such as more"),
        (lambda t: {**t, DOWN_B: t[DOWN_B][:, :4].clone()}, r"expected \(128, 8\)"),
        (lambda t: {**t, DOWN_B: t[DOWN_B].half()}, "float32 or bfloat16, got .* torch.float16"),
        (lambda t: {**t, GATE_A: t[GATE_A] + 1}, "expected equal tensors"),
        ({"r": 16}, "r: expected 8, got 16"),
        ({"lora_alpha": 8}, "lora_alpha: expected 16.0, got 8"),
        ({"use_rslora": True}, "use_rslora: expected False, got True"),
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA'"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path, change, message):
    folder = tmp_path / "adapter"
    save_adapters(with_updates(), folder)
    if isinstance(change, dict):
        _edit_config(folder, **change)
    else:
        path = folder / "adapter_model.safetensors"
        safetensors_torch.save_file(change(safetensors_torch.load_file(path)), path)
    model = with_updates(4)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapters(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_cut_off_are_named(tmp_path, name):
    save_adapters(with_updates(), tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{name}: not a whole (JSON|safetensors) file"):
        load_adapters(with_updates(), tmp_path / "adapter")


def test_models_without_updates_and_folders_without_files(tmp_path):
    model = build()
    fp8moe.freeze_experts(model)
    with pytest.raises(ValueError, match="expected frozen experts with low-rank updates"):
        save_adapters(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="found none"):
        save_adapters(nn.Linear(2, 2), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    save_adapters(with_updates(), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config\.json"):
        load_adapters(with_updates(), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"expected adapter_model\.safetensors"):
        load_adapters(with_updates(), tmp_path / "adapter")


def test_updates_of_several_ranks_are_refused(tmp_path):
    model = build()
    fp8moe.freeze_experts(model)
    for layer, rank in zip(model.model.layers, (8, 16), strict=True):
        layer.mlp.experts.add_lora(rank, 16.0)
    with pytest.raises(ValueError, match="expected one .rank, alpha, dropout. everywhere"):
        save_adapters(model, tmp_path / "adapter")
