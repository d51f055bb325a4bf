"""Models to block-FP8 checkpoints."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8moe.integrations.checkpoint_names import (
    ExpertLayer,
    Other,
    checkpoint_layout,
    is_transformers_model,
)
from fp8moe.modules.frozen import FrozenExperts
from fp8moe.quant import FP8Tensor
from fp8moe.quant.checkpoint import (
    CONFIG,
    CheckpointWriter,
    quantization_config,
    stable_per_block,
    staged_directory,
)

_NOT_LINEARS = ("gate", "router", "lm_head")  # small or sensitive: left alone, as DeepSeek-V3 does


def _linear_weights(model: nn.Module) -> set[str]:
    """Names of the nn.Linear weights in whole 128 x 128 blocks, but for routers and the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and name.rpartition(".")[2] not in _NOT_LINEARS
        and not any(size % 128 for size in module.weight.shape)
    }


def _not_converted(items: list[ExpertLayer | Other], linears: set[str]) -> list[str]:
    """Checkpoint names of the modules whose matrix `weight` stays as it is."""
    matrices = (
        name
        for item in items
        if isinstance(item, Other) and item.tensor.dim() == 2 and item.names[0] not in linears
        for name in item.checkpoint_names
    )
    return [n.removesuffix(".weight") for n in matrices if n.endswith(".weight")]


def _check_exportable(items: list[ExpertLayer | Other]) -> None:
    for item in items:
        if isinstance(item, Other):
            tensors = {item.names[0]: item.tensor}
        else:
            if isinstance(item.module, FrozenExperts) and item.module.updates():
                raise ValueError(
                    f"{item.name}: has low-rank updates; fp8moe.merge_adapters(model) first, or "
                    "save them apart with save_adapters"
                )
            tensors = {f"{item.name}.{n}": t for n, t in item.module.state_dict().items()}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")


def _finite(name: str, w: FP8Tensor) -> FP8Tensor:
    if not bool(w.scale.isfinite().all()):
        raise ValueError(f"{name}: expected finite weights, got NaN or infinity")
    return w


def _expert_tensors(layer: ExpertLayer) -> Iterator[tuple[str, FP8Tensor]]:
    for name, weight, expert, rows, _ in layer.matrices():
        if layer.weights is None:
            w = getattr(layer.module, weight)
            blocks = slice(rows.start // 128, rows.stop // 128)
            yield name, FP8Tensor(w.data[expert, rows], w.scale[expert, blocks])
        else:
            parameter = getattr(layer.module, layer.weights[0 if weight == "w13" else 1])
            yield name, stable_per_block(parameter.detach()[expert, rows])


def _write_config(model: Any, directory: Path, not_converted: Iterable[str]) -> None:
    quantization = quantization_config(not_converted)
    if is_transformers_model(model):
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = model.dtype
        config.quantization_config = quantization
        config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
    else:
        text = json.dumps({"quantization_config": quantization}, indent=2) + "\n"
        (directory / CONFIG).write_text(text, encoding="utf-8")


@torch.no_grad()
def export_fp8_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 2**30,
    linears: bool = False,
) -> Path:
    """Write the model with its experts in FP8, ready for vLLM, SGLang and transformers.

    Expert weights in BF16 or FP32 are cast with power-of-two 128 x 128 scales: the values that FP8
    training with the default FP8Config multiplied with. Frozen FP8 experts go out byte for byte.
    Everything else keeps its dtype, and `modules_to_not_convert` in config.json names it.

    An import of the result, frozen or not, exports the same bytes again. Among several processes,
    one of them should call this.

    Args:
        model: a transformers model, or any module that contains `fp8moe.Experts`, frozen or not
            (its experts are then called `<layer>.<expert>.gate_proj.weight` and so on, and
            config.json holds nothing but the quantization).
        directory: must not exist. It appears when all of it is written.
        max_shard_bytes: of tensors in one file; the host holds one file's at a time.
        linears: also cast the other nn.Linear weights that are whole 128 x 128 blocks, but for
            routers and the output head, as DeepSeek-V3 publishes them. They then lose precision
            that training did not take from them.

    Returns: directory.

    Raises: FileExistsError for a directory that exists; ValueError, with nothing left behind, for
        a model without expert layers or with ones that are not SwiGLU in multiples of 128, for
        low-rank updates that are not merged, sharded or meta tensors, NaN or infinity.
    """
    items = checkpoint_layout(model)
    _check_exportable(items)
    quantized = _linear_weights(model) if linears else set()
    with staged_directory(directory) as partial:
        writer = CheckpointWriter(partial, max_shard_bytes)
        for item in items:
            if isinstance(item, ExpertLayer):
                for name, w in _expert_tensors(item):
                    writer.add_fp8(name, _finite(name, w))
            elif item.names[0] in quantized:
                name = item.checkpoint_names[0]
                writer.add_fp8(name, _finite(name, stable_per_block(item.tensor)))
            else:
                writer.add(item.checkpoint_names[0], item.tensor)
        writer.close()
        _write_config(model, partial, _not_converted(items, quantized))
    return Path(directory)
