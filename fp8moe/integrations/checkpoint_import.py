"""Block-FP8 checkpoints to models, one tensor after the other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import FLOATS
from fp8moe.integrations.checkpoint_names import ExpertLayer, Other, checkpoint_layout
from fp8moe.modules.freeze import freeze_experts
from fp8moe.modules.frozen import FrozenExperts
from fp8moe.quant import FP8Tensor, dequantize
from fp8moe.quant.checkpoint import (
    CONFIG,
    CheckpointReader,
    check_quantization_config,
    read_json,
    scale_name,
)

_FLOATS = ("BF16", "F16", "F32")
_SHOWN = 10


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected {CONFIG} in {directory}, found none")
    config = read_json(path)
    check_quantization_config(config.get("quantization_config"))
    return config


def _source(item: Other, reader: CheckpointReader) -> str:
    """The name of a tensor in the checkpoint; tied weights may be stored under any of theirs."""
    stored = [n for n in item.checkpoint_names if n in reader.entries]
    return stored[0] if stored else item.checkpoint_names[0]


def _other_problem(item: Other, reader: CheckpointReader) -> str | None:
    name, shape = _source(item, reader), tuple(item.tensor.shape)
    entry = reader.entries.get(name)
    if entry is None:
        return f"{name}: missing"
    if reader.is_fp8(name):
        if len(shape) != 2 or not item.tensor.is_floating_point():
            return f"{name}: expected a tensor of shape {shape}, got an FP8 matrix"
        return reader.fp8_problem(name, shape)
    if entry.shape != shape:
        return f"{name}: expected shape {shape}, got {entry.shape}"
    if item.tensor.is_floating_point() != (entry.dtype in _FLOATS):
        return f"{name}: expected {item.tensor.dtype}, got {entry.dtype}"
    return None


def _problems(
    model: nn.Module, items: list[ExpertLayer | Other], reader: CheckpointReader
) -> list[str]:
    """Everything in which the checkpoint does not fit the model."""
    found: list[str | None] = []
    used: set[str] = set()
    for item in items:
        if isinstance(item, ExpertLayer):
            for name, *_, shape in item.matrices():
                found.append(reader.fp8_problem(name, shape))
                used |= {name, scale_name(name)}
        else:
            found.append(_other_problem(item, reader))
            for name in item.checkpoint_names:
                used |= {name, scale_name(name)} if reader.is_fp8(name) else {name}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    for name in reader.entries:
        if name not in used and not any(re.search(pattern, name) for pattern in ignored):
            found.append(f"{name}: not in the model")
    return [problem for problem in found if problem is not None]


def _check_targets(model: nn.Module, device: torch.device | None) -> None:
    saved = set(model.state_dict(keep_vars=True))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_meta:
            continue
        if device is None:
            raise ValueError(f"device: expected one, for {name} is on the meta device")
        if name not in saved or ".lora_" in name or "_lora." in name:
            raise ValueError(
                f"{name}: is on the meta device and not in a checkpoint, so it would have no value"
            )


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put `value` where the model has a meta tensor of this name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, leaf, value)


def _load_other(
    model: nn.Module, item: Other, reader: CheckpointReader, device: torch.device | None
) -> None:
    name, target = _source(item, reader), item.tensor
    if target.is_meta:
        target = torch.empty(target.shape, dtype=target.dtype, device=device)
    if reader.is_fp8(name):
        target.copy_(dequantize(reader.read_fp8(name, target.device)))
    else:
        target.copy_(reader.read(name))
    if item.tensor.is_meta:
        _set(model, item.names[0], target)
        tied = model.get_parameter(item.names[0]) if len(item.names) > 1 else None
        for other in item.names[1:]:
            path, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(path), leaf, tied)


def _load_frozen(layer: ExpertLayer, reader: CheckpointReader, device: torch.device | None) -> None:
    module: FrozenExperts = layer.module
    where = device if module.w13_data.is_meta else module.w13_data.device
    new = {
        weight: FP8Tensor(*(torch.empty_like(t, device=where) for t in getattr(module, weight)))
        for weight in ("w13", "w2")
    }
    for name, weight, expert, rows, _ in layer.matrices():
        w = reader.read_fp8(name)
        blocks = slice(rows.start // 128, rows.stop // 128)
        new[weight].data[expert, rows].copy_(w.data)
        new[weight].scale[expert, blocks].copy_(w.scale)
    module.set_weights(new["w13"], new["w2"])


def _load_trainable(
    layer: ExpertLayer, reader: CheckpointReader, device: torch.device | None
) -> None:
    assert layer.weights is not None
    attributes = dict(zip(("w13", "w2"), layer.weights, strict=True))
    targets = {}
    for weight, attribute in attributes.items():
        parameter = getattr(layer.module, attribute)
        if parameter.is_meta:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            _set(layer.module, attribute, empty)
        targets[weight] = getattr(layer.module, attribute)
    for name, weight, expert, rows, _ in layer.matrices():
        target = targets[weight]
        target[expert, rows].copy_(dequantize(reader.read_fp8(name, target.device)))


@torch.no_grad()
def load_fp8_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
) -> None:
    """Fill the model from a block-FP8 checkpoint, one tensor after the other.

    FrozenExperts take the bytes as they are. Other experts, and other FP8 matrices, are dequantized
    to the dtype of their parameter. Tensors on the meta device are created on `device`.

    Args:
        model: of the checkpoint's architecture.
        directory: holds config.json and safetensors files, from `export_fp8_checkpoint` or
            published in the same format.
        device: for tensors that are on the meta device.

    Raises: FileNotFoundError or ValueError, before any parameter is touched: files missing or cut
        off, another quantization or block size, missing scales, missing or unknown tensors, other
        dtypes or shapes (the message lists them), a meta tensor that the checkpoint does not have.
    """
    where = None if device is None else torch.device(device)
    folder = Path(directory)
    _read_config(folder)
    items = checkpoint_layout(model)
    _check_targets(model, where)
    reader = CheckpointReader(folder)
    problems = _problems(model, items, reader)
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{folder} does not fit the model:\n  {shown}{more}")
    for item in items:
        if isinstance(item, Other):
            _load_other(model, item, reader, where)
        elif item.weights is None:
            _load_frozen(item, reader, where)
        else:
            _load_trainable(item, reader, where)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside get their parameters on the meta device, buffers where they belong."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError(
            "model_from_fp8_checkpoint needs accelerate: pip install 'fp8moe[hf]'"
        ) from error
    with init_empty_weights(include_buffers=False):
        yield


def _keep_in_fp32(model: Any) -> None:
    """What the class wants in FP32 whatever the model's dtype, a router's bias say."""
    patterns = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and patterns & set(name.split(".")):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            value = tensor.detach().float()
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            setattr(module, leaf, value)


def model_from_fp8_checkpoint(
    directory: str | os.PathLike[str],
    *,
    frozen: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    keep_transpose: bool = False,
    config: FP8Config | None = None,
) -> Any:
    """A transformers causal language model from a block-FP8 checkpoint, to be trained.

    Its parameters are created on `device` one by one, in their final form.

    Args:
        directory: a folder on disk; see `load_fp8_checkpoint`.
        frozen: experts stay FP8 (`fp8moe.FrozenExperts`; add updates with
            `fp8moe.freeze_experts(model, lora_rank=...)`). Otherwise they are dequantized
            parameters, and `model.set_experts_implementation("fp8moe")` trains them in FP8.
        device: of the model.
        dtype: of the parameters.
        keep_transpose, config: see `fp8moe.FrozenExperts`; for frozen experts only.

    Returns: the model, in training mode, without `quantization_config` in its config.

    Raises: ImportError without transformers or accelerate; ValueError for another dtype and for
        settings of frozen experts without `frozen`; the errors of `load_fp8_checkpoint`.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    if not frozen and (keep_transpose or config is not None):
        name = "keep_transpose" if keep_transpose else "config"
        raise ValueError(
            f"{name}: is for frozen experts, but frozen=False; the experts implementation that is "
            "set on the model decides how others compute"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            "model_from_fp8_checkpoint needs transformers: pip install 'fp8moe[hf]'"
        ) from error
    folder = Path(directory)
    _read_config(folder)
    model_config = AutoConfig.from_pretrained(folder)
    del model_config.quantization_config
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    _keep_in_fp32(model)
    model.tie_weights()
    if frozen:
        freeze_experts(model, keep_transpose=keep_transpose, config=config)
    load_fp8_checkpoint(model, folder, device=device)
    return model.to(device)
