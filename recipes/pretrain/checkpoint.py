"""Checkpoints that are either whole or absent: a temporary folder, synced, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .parallel import part_like, whole

_PREFIX = "step_"
_PARTIAL = ".partial-"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """One saved step: ``state`` holds plain values, ``tensors(name)`` reads a safetensors file."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / f"{name}.safetensors")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON file so that a reader finds the old text or the new one, never a part."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    partial.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes ``folder/step_<step>`` and then removes all but the newest ``keep`` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_PARTIAL}{os.getpid()}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    for name, values in tensors.items():
        whole = {key: value.detach().contiguous() for key, value in values.items()}
        save_file(whole, partial / f"{name}.safetensors")
        _sync(partial / f"{name}.safetensors")
    (partial / _STATE).write_text(json.dumps({**state, "step": step}, indent=2), encoding="utf-8")
    _sync(partial / _STATE)
    _sync(partial)
    target = folder / f"{_PREFIX}{step:07d}"
    if target.exists():  # of a run that was resumed from an older checkpoint
        shutil.rmtree(target)
    os.rename(partial, target)
    _sync(folder)
    for old in _complete(folder)[:-keep]:
        _remove(old)
    return target


def _remove(path: Path) -> None:
    """Takes a checkpoint out of sight in one step, then deletes it."""
    hidden = path.with_name(f"{_PARTIAL}{path.name}")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith(_PREFIX))


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None; what a killed run left half-written is deleted."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(_PARTIAL):
                shutil.rmtree(path)
    found = _complete(folder)
    if not found:
        return None
    state = json.loads((found[-1] / _STATE).read_text(encoding="utf-8"))
    return Checkpoint(found[-1], state)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter name>/<state name>``: no pickle in a checkpoint."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value
    return whole(found)


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Undoes ``optimizer_tensors``."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = part_like(value, parameter)


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
