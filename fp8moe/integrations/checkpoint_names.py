"""What the tensors of a model are called in a checkpoint: one matrix per expert and projection."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp8moe.modules.expert_list import ListedExperts
from fp8moe.modules.freeze import expert_weight_names
from fp8moe.modules.frozen import FrozenExperts, check_frozen_sizes


@dataclass(frozen=True)
class ExpertLayer:
    """One expert layer and the checkpoint's names for it.

    Args:
        name: of the module in the model.
        module: FrozenExperts, or a module with the two weights below.
        weights: names of its (E, 2I, H) and (E, H, I) parameters; None for FrozenExperts.
        shape: (E, H, I).
        gate, up, down: names of each expert's weights (I, H), (I, H) and (H, I).
    """

    name: str
    module: Any
    weights: tuple[str, str] | None
    shape: tuple[int, int, int]
    gate: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]

    def matrices(self) -> Iterator[tuple[str, str, int, slice, tuple[int, int]]]:
        """(checkpoint name, "w13" or "w2", expert, rows of that weight, shape) of every matrix."""
        e, hidden, inner = self.shape
        for g in range(e):
            yield self.gate[g], "w13", g, slice(0, inner), (inner, hidden)
            yield self.up[g], "w13", g, slice(inner, 2 * inner), (inner, hidden)
            yield self.down[g], "w2", g, slice(0, hidden), (hidden, inner)


@dataclass(frozen=True)
class Other:
    """A tensor outside of expert layers.

    Args:
        names: every name under which the model has it (tied weights have several).
        checkpoint_names: the checkpoint's for each of them.
        tensor: the parameter or buffer itself.
    """

    names: tuple[str, ...]
    checkpoint_names: tuple[str, ...]
    tensor: torch.Tensor


def is_transformers_model(model: nn.Module) -> bool:
    """Whether the model is a PreTrainedModel; does not import transformers."""
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


class _Names:
    """From names in the model to names in checkpoints, as transformers' own save has them."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._known = is_transformers_model(model)
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        if self._known:
            self._read_transformers()

    def _read_transformers(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(self._model, add_legacy=False)
        # What a prefix was in the file that the model once came from does not matter here.
        transforms = [t for t in transforms if not isinstance(t, PrefixChange)]
        reverse = [t.reverse_transform() for t in reversed(transforms)]
        self._renamings = [t for t in reverse if isinstance(t, WeightRenaming)]
        self._converters = [t for t in reverse if isinstance(t, WeightConverter)]

    def _rename(self, name: str) -> tuple[str, Any]:
        """The checkpoint's name, and the converter that splits the tensor, if there is one."""
        if not self._known:
            return name, None
        # Step by step, because transformers 5.7 has no function that does this in the order of
        # saving: one converter at most, which knows the model's names, then all renamings.
        renamed, converter = name, None
        for candidate in self._converters:
            renamed, pattern = candidate.rename_source_key(renamed)
            if pattern is not None:
                converter = copy.deepcopy(candidate)
                break
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        return renamed, converter

    def one(self, name: str) -> str:
        """The name of a tensor that is stored as it is."""
        renamed, converter = self._rename(name)
        if converter is not None:
            raise ValueError(
                f"{name}: transformers stores this tensor in another form, which is not supported"
            )
        return renamed

    def _split(self, name: str, labels: torch.Tensor) -> dict[int, str]:
        """Names of the parts into which transformers splits `name`, by the label in each part."""
        renamed, converter = self._rename(name)
        if converter is None:
            raise ValueError(
                f"{name}: transformers stores these experts in one tensor; expected a matrix per "
                "expert"
            )
        converter.add_tensor(renamed, name, converter.source_patterns[0], labels)
        parts = converter.convert(renamed, model=self._model, config=self._model.config)
        found: dict[int, str] = {}
        for part_name, part in parts.items():
            part = part[0] if isinstance(part, list) else part
            if part.numel() == 1:
                found[int(part)] = part_name
        if sorted(found) != list(range(labels.numel())):
            raise ValueError(f"{name}: expected a matrix per expert, gate and up apart")
        return found

    def experts(
        self, name: str, module: nn.Module, num_experts: int
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Names of the gate, up and down weights of each expert."""
        own: tuple[str, ...] | None = None if self._known else FrozenExperts.projections
        if isinstance(module, ListedExperts):
            own = module.layout.names
        elif isinstance(module, FrozenExperts) and "projections" in vars(module):
            own = module.projections
        if own is not None:
            prefix = f"{name}." if name else ""
            gate, up, down = (
                tuple(f"{prefix}{g}.{part}.weight" for g in range(num_experts)) for part in own
            )
            return gate, up, down
        # Tiny stand-ins for the weights, whose values tell which part went where.
        labels = torch.arange(2 * num_experts).view(num_experts, 2, 1)
        halves = self._split(f"{name}.gate_up_proj", labels)
        downs = self._split(f"{name}.down_proj", labels[:, 0] // 2)
        return (
            tuple(halves[2 * g] for g in range(num_experts)),
            tuple(halves[2 * g + 1] for g in range(num_experts)),
            tuple(downs[g] for g in range(num_experts)),
        )


def _refuse_sharded(name: str, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a sharded {type(tensor).__name__}; gather the "
            "model first"
        )


def checkpoint_experts(model: nn.Module) -> list[ExpertLayer]:
    """Every expert layer of the model, in its order.

    Raises: ValueError for a model without any, or with ones of another form, size or sharding.
    """
    return _experts(model, _Names(model))


def _experts(model: nn.Module, names: _Names) -> list[ExpertLayer]:
    layers = []
    for name, module in model.named_modules():
        try:
            if isinstance(module, FrozenExperts):
                weights = None
                shape = (module.num_experts, module.hidden_size, module.intermediate_size)
            else:
                weights = expert_weight_names(module)
                if weights is None:
                    continue
                for weight in weights:
                    _refuse_sharded(weight, getattr(module, weight))
                shape = tuple(getattr(module, weights[1]).shape)
                check_frozen_sizes(*shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        per_expert = names.experts(name, module, shape[0])
        layers.append(ExpertLayer(name, module, weights, shape, *per_expert))
    if not layers:
        raise ValueError(f"model: expected expert layers in {type(model).__name__}, found none")
    return layers


def checkpoint_layout(model: nn.Module) -> list[ExpertLayer | Other]:
    """Every expert layer and every other tensor of the model's state dict, in its order.

    Raises: ValueError as `checkpoint_experts`, and for adapters or shards outside of the experts,
        which a checkpoint has no place for.
    """
    names = _Names(model)
    layers = {layer.name: layer for layer in _experts(model, names)}
    items: list[ExpertLayer | Other] = []
    others: dict[int, int] = {}  # id of a tensor -> its place in items
    seen: set[str] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        layer = next((n for n in layers if not n or key.startswith(f"{n}.")), None)
        if layer is not None:
            if layer not in seen:
                seen.add(layer)
                items.append(layers[layer])
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{key}: expected a tensor in the state dict, got {type(tensor)}")
        if ".lora_" in key:
            raise ValueError(f"{key}: merge the adapters first; a checkpoint has no place for them")
        _refuse_sharded(key, tensor)
        name = names.one(key)
        if id(tensor) in others:
            at = others[id(tensor)]
            tied = items[at]
            assert isinstance(tied, Other)
            items[at] = Other((*tied.names, key), (*tied.checkpoint_names, name), tensor)
        else:
            others[id(tensor)] = len(items)
            items.append(Other((key,), (name,), tensor))
    return items
