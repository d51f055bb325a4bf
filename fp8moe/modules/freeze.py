"""freeze_experts: a model's experts to FP8, in place; merge_adapters: their updates back in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional.frozen import check_frozen_config
from fp8moe.modules.expert_list import ListedExperts
from fp8moe.modules.experts import Experts
from fp8moe.modules.frozen import FrozenExperts, check_frozen_sizes
from fp8moe.modules.lora import LowRankUpdate, check_lora
from fp8moe.modules.stacked import StackedExperts, misfit, unsupported


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze_experts` did.

    Args:
        frozen: names of the expert layers that are FP8 now, those that were so before included.
        fp8_bytes: memory of their weights and scales, stored transposes included.
        lora_parameters: number of trainable elements in their low-rank updates.
    """

    frozen: tuple[str, ...]
    fp8_bytes: int
    lora_parameters: int

    def __str__(self) -> str:
        return (
            f"freeze_experts: {len(self.frozen)} expert layers in FP8, "
            f"{self.fp8_bytes / 2**30:.3g} GiB; {self.lora_parameters:,} trainable parameters in "
            "their low-rank updates"
        )


def expert_weight_names(module: Any) -> tuple[str, str] | None:
    """Names of the (E, 2I, H) and (E, H, I) weights of an expert layer; None for other modules.

    Raises: ValueError for Experts with an ep_group, and for experts of transformers that are not
        silu(gate) * up in this layout, or that are not called with hidden states, expert ids and
        weights.
    """
    if isinstance(module, Experts):
        if module.ep_mesh is not None:
            raise ValueError(
                f"Experts: expected all experts in one process, got them spread over the "
                f"{module.ep_mesh.size()} ranks of an ep_group"
            )
        return "w13", "w2"
    stacked = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(w, torch.Tensor) and w.dim() == 3 for w in stacked):
        return None
    kind = type(module).__name__
    reason = None if isinstance(module, StackedExperts) else unsupported(module)
    if reason is not None:
        raise ValueError(f"{kind}: fp8moe does not support {reason}")
    reason = misfit(module)
    if reason is not None:
        raise ValueError(f"{kind}: {reason}")
    return "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class _Layer:
    names: tuple[str, ...]  # every path that leads to the module
    module: nn.Module
    weights: tuple[str, str] | None  # None: frozen already


def _layers(model: nn.Module) -> list[_Layer]:
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    layers = []
    for module, names in paths.items():
        try:
            frozen = isinstance(module, FrozenExperts)
            weights = None if frozen else expert_weight_names(module)
            if weights is not None:
                w2 = getattr(module, weights[1])
                check_frozen_sizes(*w2.shape)
            if frozen or weights is not None:
                layers.append(_Layer(tuple(names), module, weights))
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from error
    return layers


def _frozen(layer: _Layer, config: FP8Config, keep_transpose: bool) -> FrozenExperts:
    assert layer.weights is not None
    w13, w2 = (getattr(layer.module, name).detach() for name in layer.weights)
    new = FrozenExperts.from_weights(w13, w2, config=config, keep_transpose=keep_transpose)
    if isinstance(layer.module, ListedExperts):
        new.projections = layer.module.layout.names
    return new.train(layer.module.training)


def _bytes(experts: FrozenExperts) -> int:
    return sum(t.numel() * t.element_size() for t in experts.buffers())


@torch.no_grad()
def freeze_experts(
    model: nn.Module,
    *,
    lora_rank: int | None = None,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    lora_dtype: torch.dtype = torch.float32,
    keep_transpose: bool = False,
    config: FP8Config | None = None,
) -> FreezeReport:
    """Every expert layer of the model becomes FrozenExperts, in place, one after the other.

    Known are `fp8moe.Experts` (also those that `replace_experts` made) and the experts modules of
    transformers, with gate_up_proj (E, 2I, H), down_proj (E, H, I) and SiLU. Each layer's old
    weights are freed before the next one is cast, if nothing else holds them: freeze before making
    an optimizer. Layers that are frozen already stay so, and get updates if `lora_rank` is given.
    Other parameters are left alone, and stay trainable if they were: see `train_only_adapters`.
    With PEFT for other layers, call `get_peft_model` first, which freezes all but its own.

    Args:
        model: any module that contains expert layers, also on the meta device.
        lora_rank: of the low-rank updates, a multiple of 8; None for none.
        lora_alpha, lora_dropout, lora_dtype: see `LowRankUpdate`.
        keep_transpose, config: see `FrozenExperts`.

    Returns: the layers' names, their memory, and the number of trainable parameters in them.

    Raises: ValueError, before anything changes: no expert layer, experts of another form or sizes
        that are not multiples of 128 (named), or a setting that cannot be.
    """
    config = FP8Config() if config is None else config
    check_frozen_config(config)
    if lora_rank is not None:
        check_lora(lora_rank, lora_alpha, lora_dropout, lora_dtype)
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"model: expected expert layers in {type(model).__name__}, found none (experts in a "
            "ModuleList: call fp8moe.replace_experts first)"
        )
    for layer in layers:
        if layer.module is model and layer.weights is not None:
            raise ValueError("model: expected a module that contains expert layers, got one itself")
        if lora_rank is not None and isinstance(layer.module, FrozenExperts):
            if layer.module.updates():
                raise ValueError(f"{layer.names[0]}: has low-rank updates already")

    names, fp8_bytes, lora_parameters = [], 0, 0
    while layers:
        layer = layers.pop(0)  # so that nothing here holds the old weights of finished layers
        experts: Any = layer.module
        if layer.weights is not None:
            experts = _frozen(layer, config, keep_transpose)
            for name in layer.names:
                model.set_submodule(name, experts)
        if lora_rank is not None:
            experts.add_lora(lora_rank, lora_alpha, dropout=lora_dropout, dtype=lora_dtype)
        names.append(layer.names[0])
        fp8_bytes += _bytes(experts)
        lora_parameters += sum(p.numel() for p in experts.parameters())
    return FreezeReport(tuple(names), fp8_bytes, lora_parameters)


def merge_adapters(model: nn.Module) -> int:
    """`FrozenExperts.merge_adapters` of every layer that has low-rank updates.

    Returns: how many layers had any.
    """
    frozen = [m for m in model.modules() if isinstance(m, FrozenExperts) and m.updates()]
    for experts in frozen:
        experts.merge_adapters()
    return len(frozen)


def train_only_adapters(model: nn.Module) -> int:
    """requires_grad for the low-rank updates of experts alone; every other parameter is frozen.

    Returns: the number of trainable elements.
    """
    model.requires_grad_(False)
    updates = [m for m in model.modules() if isinstance(m, LowRankUpdate)]
    for update in updates:
        update.requires_grad_(True)
    return sum(p.numel() for update in updates for p in update.parameters())
