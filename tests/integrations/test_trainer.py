"""The Trainer's checkpoints of models with frozen experts hold their low-rank updates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import checkpoint_models
import pytest
import torch
from checkpoint_models import VOCAB
from tiny_models import transformers

import fp8moe
from fp8moe.integrations.trainer import adapter_checkpoints

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


def build() -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        checkpoint_models.build("qwen3_moe", dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    fp8moe.freeze_experts(model, lora_rank=8)
    return model


def train(
    folder: Path,
    *,
    callbacks: list[Any],
    resume: Path | None = None,
    best: bool = False,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """The trained weights after (in all) four steps, with a checkpoint every second one."""
    model = build()
    rows = [{"input_ids": t, "labels": t} for t in torch.arange(256).reshape(8, 32) * 7 % VOCAB]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 4, "learning_rate": 1e-2, **changes},
        per_device_train_batch_size=2,
        save_steps=2,
        eval_strategy="steps" if best else "no",
        eval_steps=2,
        load_best_model_at_end=best,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, set[bool]]:
    """Whether weights are the same, of PEFT's adapters and of the experts' updates."""
    found: dict[str, set[bool]] = {"peft": set(), "experts": set()}
    for name in a:
        kind = "experts" if ".experts." in name else "peft"
        found[kind].add(torch.equal(a[name], b[name]))
    return found


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    straight = train(tmp_path, callbacks=[adapter_checkpoints()])
    for _ in range(2):  # the second time over the checkpoints of the first
        resumed = train(
            tmp_path, callbacks=[adapter_checkpoints()], resume=tmp_path / "checkpoint-2"
        )
        assert same(straight, resumed) == {"peft": {True}, "experts": {True}}
    forgotten = train(tmp_path / "without", callbacks=[])
    assert same(straight, forgotten) == {"peft": {True}, "experts": {True}}
    lost = train(tmp_path / "without", callbacks=[], resume=tmp_path / "without" / "checkpoint-2")
    assert False in same(straight, lost)["experts"]


def test_a_checkpoint_without_updates_is_refused(tmp_path):
    train(tmp_path, callbacks=[], max_steps=2)
    with pytest.raises(FileNotFoundError, match="checkpoint-2/fp8moe/experts"):
        train(tmp_path, callbacks=[adapter_checkpoints()], resume=tmp_path / "checkpoint-2")


def test_the_best_checkpoint_comes_back_whole(tmp_path):
    first = train(tmp_path / "short", callbacks=[], max_steps=2, lr_scheduler_type="constant")
    best = train(  # the loss falls, so with the highest as the best it is that of step 2
        tmp_path / "long",
        callbacks=[adapter_checkpoints()],
        best=True,
        greater_is_better=True,
        lr_scheduler_type="constant",
    )
    assert same(first, best) == {"peft": {True}, "experts": {True}}


def test_transformers_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fp8moe\[hf\]'"):
        adapter_checkpoints()
