"""Checkpoints are whole or absent; metrics end where a checkpoint says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.pretrain import checkpoint, metrics
from recipes.pretrain.config import Config, UserError
from recipes.pretrain.optimizer import ClippedAdamW


def _save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {"a": {"x": torch.full((3,), float(step)).t()}, "b": {"y": torch.arange(4)}}
    return checkpoint.save(folder, step, tensors, {"metrics_bytes": step}, keep)


def test_latest_is_the_newest_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (5, 10, 100):
        _save(tmp_path, step)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state == {"metrics_bytes": 100, "step": 100}
    assert found.tensors("a")["x"].tolist() == [100.0] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000010", "step_0000100"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    checkpoint.save(tmp_path, 5, {"a": {"x": torch.zeros(1)}}, {}, keep=2)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.tensors("a")["x"].tolist() == [0.0]


@pytest.mark.parametrize("file", ["save_file", "_sync", "os.rename"])
def test_a_failure_while_saving_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    _save(tmp_path, 5)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(f"recipes.pretrain.checkpoint.{file}", fail)
        _save(tmp_path, 10)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.state["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000005"]  # what was half-written is gone


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    checkpoint.write_json(path, {"a": 1})
    checkpoint.write_json(path, {"b": [2]})
    assert json.loads(path.read_text()) == {"b": [2]}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def _trained(steps: int, device: torch.device) -> tuple[nn.Module, ClippedAdamW]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to(device)
    optimizer = ClippedAdamW(model, Config(lr=0.1, warmup_steps=1))
    _train(model, optimizer, range(steps))
    return model, optimizer


def _train(model: nn.Module, optimizer: ClippedAdamW, steps: range) -> None:
    device = next(model.parameters()).device
    for step in steps:
        x = torch.full((3, 4), 0.1 * step - 0.3, device=device)
        model(x).square().sum().backward()
        optimizer.step(step)


def test_optimizer_continues_bit_for_bit(tmp_path: Path, device: torch.device) -> None:
    whole, _ = _trained(6, device)
    model, optimizer = _trained(3, device)
    tensors = {
        "model": model.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(model, optimizer.adamw),
    }
    checkpoint.save(tmp_path, 3, tensors, {}, keep=1)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    other, other_optimizer = _trained(0, device)
    other.load_state_dict(saved.tensors("model"))
    checkpoint.load_optimizer(other, other_optimizer.adamw, saved.tensors("optimizer"))
    _train(other, other_optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clipped_update_is_adamw_on_clipped_gradients(device: torch.device) -> None:
    config = Config(lr=0.1, warmup_steps=1, clip=0.5)
    torch.manual_seed(0)
    ours = nn.Linear(6, 3).to(device)
    plain = nn.Linear(6, 3).to(device)
    plain.load_state_dict(ours.state_dict())
    optimizer = ClippedAdamW(ours, config)
    reference = torch.optim.AdamW(
        [{"params": [plain.weight]}, {"params": [plain.bias], "weight_decay": 0.0}],
        lr=0.1, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
    )  # fmt: skip
    for model in (ours, plain):
        model(torch.full((2, 6), 3.0, device=device)).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    reference.step()
    norm = optimizer.step(0)
    assert norm.item() == pytest.approx(expected.item()) and expected > 0.5
    torch.testing.assert_close(ours.weight, plain.weight)
    torch.testing.assert_close(ours.bias, plain.bias)
    assert ours.weight.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_changes_nothing(bad: float, device: torch.device) -> None:
    model, optimizer = _trained(2, device)
    before = [p.detach().clone() for p in model.parameters()]
    moments = checkpoint.optimizer_tensors(model, optimizer.adamw)
    moments = {key: value.clone() for key, value in moments.items()}
    model(torch.ones(3, 4, device=device)).sum().backward()
    next(model.parameters()).grad[0, 0] = bad  # type: ignore[index]
    assert not math.isfinite(optimizer.step(2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = checkpoint.optimizer_tensors(model, optimizer.adamw)
    assert all(torch.equal(after[key], value) for key, value in moments.items())


def test_metrics_are_cut_at_the_offset(tmp_path: Path) -> None:
    log = metrics.Metrics(tmp_path)
    log.write(metrics.VALID, step=1, model="fp8", loss=1.5)
    offset = log.offset()
    log.write(metrics.VALID, step=2, model="fp8", loss=math.nan)
    log.close()
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]
    log = metrics.Metrics(tmp_path, offset, step=1)
    log.write(metrics.VALID, step=3, model="bf16", loss=1.0)
    log.close()
    records = metrics.read(tmp_path)
    assert [r["step"] for r in records] == [1, 3]
    assert [r["step"] for r in metrics.of_kind(records, metrics.VALID, "fp8")] == [1]


def test_metrics_shorter_than_the_checkpoint_says(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected at least 10 bytes, .* got 0"):
        metrics.Metrics(tmp_path, offset=10)
    assert list(tmp_path.iterdir()) == []


def test_smooth() -> None:
    assert metrics.smooth([1, 3, 5, math.nan], 2) == [1, 2, 4, 5]
    assert math.isnan(metrics.smooth([math.nan], 3)[0])
