"""The low-rank updates of frozen experts to and from a file of their own, in PEFT's format.

An expert's update of w13 = [gate rows | up rows] is one A and one B; PEFT knows an A and a B for
each of the two projections. They share A, and B's rows are split between them:

    base_model.model.<layer>.<expert>.gate_proj.lora_A.weight   A                 (r, H)
    base_model.model.<layer>.<expert>.gate_proj.lora_B.weight   gate rows of B    (I, r)
    base_model.model.<layer>.<expert>.up_proj.lora_A.weight     A again           (r, H)
    base_model.model.<layer>.<expert>.up_proj.lora_B.weight     up rows of B      (I, r)
    base_model.model.<layer>.<expert>.down_proj.lora_A.weight   A of w2           (r, I)
    base_model.model.<layer>.<expert>.down_proj.lora_B.weight   B of w2           (H, r)

in adapter_model.safetensors, beside adapter_config.json. Names are those of the checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8moe.integrations.checkpoint_names import ExpertLayer, checkpoint_experts
from fp8moe.modules.frozen import FrozenExperts
from fp8moe.modules.lora import LowRankUpdate
from fp8moe.quant.checkpoint import open_safetensors, read_json, staged_directory

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_DTYPES = (torch.float32, torch.bfloat16)


def _layers(model: Any) -> list[ExpertLayer]:
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # PEFT's wrapper is not part of the names
    layers = [
        layer
        for layer in checkpoint_experts(model)
        if isinstance(layer.module, FrozenExperts) and layer.module.updates()
    ]
    if not layers:
        raise ValueError(
            "model: expected frozen experts with low-rank updates, found none; "
            "fp8moe.freeze_experts(model, lora_rank=...) makes them"
        )
    return layers


def _settings(layers: list[ExpertLayer]) -> tuple[int, float, float]:
    """(rank, alpha, dropout) of all updates, which must agree."""
    updates = [(layer.name, u) for layer in layers for u in layer.module.updates().values()]
    found = {(u.rank, u.alpha, u.dropout): name for name, u in updates}
    if len(found) > 1:
        listed = ", ".join(f"{name} {settings}" for settings, name in found.items())
        raise ValueError(f"model: expected one (rank, alpha, dropout) everywhere, got {listed}")
    return next(iter(found))


def _parts(layer: ExpertLayer) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, the part of a parameter that it stands for) of one layer; A of w13 comes twice."""
    for name, weight, expert, rows, _ in layer.matrices():
        update: LowRankUpdate = layer.module.updates()[weight]
        base = _PREFIX + name.removesuffix(".weight")
        yield f"{base}.lora_A.weight", update.lora_A.detach()[expert]
        yield f"{base}.lora_B.weight", update.lora_B.detach()[expert, rows]


def _config(layers: list[ExpertLayer]) -> dict[str, Any]:
    rank, alpha, dropout = _settings(layers)
    names = {n.split(".")[-2] for layer in layers for n, *_ in layer.matrices()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(names),
        "bias": "none",
        "use_rslora": False,
    }


@torch.no_grad()
def save_adapters(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the low-rank updates of the model's frozen experts, and nothing else.

    Args:
        model: with experts from `freeze_experts(model, lora_rank=...)`, all of one rank and alpha.
        directory: must not exist. It appears when all of it is written.

    Returns: directory.

    Raises: FileExistsError for a directory that exists; ValueError for a model without updates or
        with updates of several ranks; ImportError without safetensors.
    """
    _require_safetensors()
    from safetensors.torch import save_file

    layers = _layers(model)
    config = _config(layers)
    tensors = {
        key: torch.empty(part.shape, dtype=part.dtype).copy_(part)
        for layer in layers
        for key, part in _parts(layer)
    }
    with staged_directory(directory) as partial:
        save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (partial / _CONFIG).write_text(text, encoding="utf-8")
    return Path(directory)


@torch.no_grad()
def load_adapters(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Fill the low-rank updates of the model's frozen experts from `save_adapters`.

    Args:
        model: with updates of the same rank and alpha.
        directory: holds adapter_model.safetensors and adapter_config.json.

    Raises: FileNotFoundError or ValueError, before any parameter is touched: files missing or cut
        off, another rank or alpha, missing or unknown tensors, other shapes or dtypes, gate and up
        projections that do not share their A.
    """
    _require_safetensors()
    folder = Path(directory)
    for name in (_WEIGHTS, _CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"directory: expected {name} in {folder}, found none")
    layers = _layers(model)
    expected = _config(layers)
    given = read_json(folder / _CONFIG)
    for key in ("peft_type", "r", "lora_alpha", "use_rslora"):
        if given.get(key, False) != expected[key]:
            raise ValueError(
                f"{_CONFIG}: {key}: expected {expected[key]!r}, got {given.get(key)!r}"
            )
    opened = open_safetensors(folder / _WEIGHTS)
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    parts = {key: part for layer in layers for key, part in _parts(layer)}
    _check(parts, tensors, layers)
    for layer in layers:
        for key, part in _parts(layer):
            part.copy_(tensors[key])


def _check(
    parts: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], layers: list[ExpertLayer]
) -> None:
    for names, what in (
        (parts.keys() - tensors.keys(), "missing"),
        (tensors.keys() - parts.keys(), "not in the model"),
    ):
        if names:
            raise ValueError(f"{_WEIGHTS}: {len(names)} tensors {what}, such as {min(names)}")
    for key, part in parts.items():
        got = tensors[key]
        if got.shape != part.shape or got.dtype not in _DTYPES:
            raise ValueError(
                f"{_WEIGHTS}: {key}: expected {tuple(part.shape)} in float32 or bfloat16, got "
                f"{tuple(got.shape)} in {got.dtype}"
            )
    for layer in layers:
        for gate, up in zip(layer.gate, layer.up, strict=True):
            first, second = (
                f"{_PREFIX}{n.removesuffix('.weight')}.lora_A.weight" for n in (gate, up)
            )
            if not torch.equal(tensors[first], tensors[second]):
                raise ValueError(
                    f"{_WEIGHTS}: {first} and {second}: expected equal tensors, for the update "
                    "of gate and up has one A"
                )


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError("adapters need safetensors: pip install 'fp8moe[hf]'") from error
