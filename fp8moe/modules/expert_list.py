"""Experts kept as a ModuleList of SwiGLU MLPs, one after another: stacked, with their old keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import FLOATS, check_size
from fp8moe.modules.experts import Experts
from fp8moe.modules.stacked import is_silu

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of an expert's gate, up and down projection: Llama's and Mixtral's."""

_ACTIVATIONS = ("act_fn", "act", "activation", "activation_fn")
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class ListLayout:
    """Sizes of a list of experts, and what an expert calls its gate, up and down projection."""

    names: tuple[str, str, str]
    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def key_names(self) -> str:
        return "/".join(self.names)

    def keys(self, expert: int, prefix: str = "") -> tuple[str, str, str]:
        """State-dict keys of one expert's gate, up and down weights."""
        gate, up, down = (f"{prefix}{expert}.{name}.weight" for name in self.names)
        return gate, up, down


class NotConvertible(Exception):
    """Why a module cannot be replaced; its text completes "left as it is: ..."."""


def projections(expert: nn.Module) -> tuple[str, str, str] | None:
    """The names of the three projections if this looks like a SwiGLU MLP, else None."""
    for names in PROJECTIONS:
        if all(hasattr(expert, name) for name in names):
            return names
    return None


def _check_expert(expert: nn.Module, names: tuple[str, str, str]) -> None:
    kind = type(expert).__name__
    for name in names:
        layer = getattr(expert, name)
        if type(layer) is not nn.Linear:
            raise NotConvertible(f"{kind}.{name} is a {type(layer).__name__}; expected nn.Linear")
        if layer.bias is not None:
            raise NotConvertible(f"{kind}.{name} has a bias; expected none")
        if type(layer.weight) is not nn.Parameter:
            raise NotConvertible(
                f"{kind}.{name}.weight is a {type(layer.weight).__name__}; expected an nn.Parameter"
            )
        if layer.weight.is_meta:
            raise NotConvertible(f"{kind}.{name}.weight is on the meta device: load it first")
    for name, child in expert.named_children():
        if name not in names and name not in _ACTIVATIONS:
            raise NotConvertible(f"{kind}.{name} ({type(child).__name__}) has no place in SwiGLU")
    for name in _ACTIVATIONS:
        activation = getattr(expert, name, None)
        if callable(activation) and not is_silu(activation):
            label = getattr(activation, "__name__", type(activation).__name__)
            raise NotConvertible(f"{kind}.{name} is {label}; expected SiLU")
    own = [name for name, _ in expert.named_parameters(recurse=False)]
    own += [name for name, _ in expert.named_buffers()]
    if own:
        raise NotConvertible(f"{kind} has tensors of its own: {', '.join(own)}")


def _probe(expert: nn.Module, names: tuple[str, str, str]) -> None:
    """Compare forward with the formula, with small and with large inputs, which meet clamps."""
    gate, up, down = (getattr(expert, name).weight for name in names)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_TOKENS, gate.shape[1], generator=generator)
    for size in (1.0, 50.0):
        probe = (size * x).to(gate.device, gate.dtype)
        expected = F.linear(F.silu(F.linear(probe, gate)) * F.linear(probe, up), down)
        bound = max(1e-5, 4 * torch.finfo(gate.dtype).eps) * float(expected.float().norm())
        if not float((expert(probe).float() - expected.float()).norm()) <= bound:
            raise NotConvertible(
                f"{type(expert).__name__} does not compute {names[2]}(silu({names[0]} x) * "
                f"{names[1]} x) on inputs of size {size:g}"
            )


def inspect_list(experts: nn.ModuleList, config: FP8Config) -> ListLayout:
    """Check that these are SwiGLU MLPs of one shape, and read their sizes. Changes nothing.

    Raises: NotConvertible, saying what is in the way.
    """
    first = experts[0]
    names = projections(first)
    if names is None:
        known = " or ".join("/".join(names) for names in PROJECTIONS)
        raise NotConvertible(f"{type(first).__name__} has no {known}")
    if len({id(expert) for expert in experts}) != len(experts):
        raise NotConvertible("the same expert is in the list twice")
    for expert in experts:
        if type(expert) is not type(first):
            raise NotConvertible(
                f"experts of different classes: {type(first).__name__}, {type(expert).__name__}"
            )
        _check_expert(expert, names)
    intermediate, hidden = getattr(first, names[0]).weight.shape
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    for name, shape in zip(names, shapes, strict=True):
        weights = [getattr(expert, name).weight for expert in experts]
        for e, weight in enumerate(weights):
            if tuple(weight.shape) != shape:
                raise NotConvertible(
                    f"expert {e}: {name}.weight is {tuple(weight.shape)}; expected {shape}"
                )
    weights = [getattr(expert, name).weight for expert in experts for name in names]
    for what, values in (
        ("dtypes", {str(w.dtype) for w in weights}),
        ("devices", {str(w.device) for w in weights}),
        ("requires_grad", {str(w.requires_grad) for w in weights}),
    ):
        if len(values) > 1:
            raise NotConvertible(f"experts of different {what}: {', '.join(sorted(values))}")
    if weights[0].dtype not in FLOATS:
        raise NotConvertible(f"weights in {weights[0].dtype}; expected bfloat16, float16, float32")
    try:
        check_size("hidden size", hidden, config)
        check_size("intermediate size", intermediate, config)
    except ValueError as error:
        raise NotConvertible(str(error)) from error
    with torch.no_grad():
        _probe(first, names)
    return ListLayout(names, len(experts), hidden, intermediate)


class ListedExperts(Experts):
    """Experts whose state dict has one key per expert and projection, as the ModuleList had it.

    `w13` and `w2` are the parameters; in a state dict they appear as views named
    `<expert>.<projection>.weight`, and are loaded from such keys.

    Args:
        experts: the list to stack, as checked by `inspect_list`. Its parameters become views of
            the stacked ones, so that no weight is held twice.
        layout: from `inspect_list`.
        config: precision of each GEMM.
    """

    def __init__(self, experts: nn.ModuleList, layout: ListLayout, config: FP8Config) -> None:
        sizes = (layout.num_experts, layout.hidden_size, layout.intermediate_size)
        like = getattr(experts[0], layout.names[0]).weight
        # Created without memory, and given it below: the initial values would be thrown away.
        super().__init__(*sizes, config=config, device="meta", dtype=like.dtype)
        self.layout = layout
        for name in ("w13", "w2"):
            empty = torch.empty_like(getattr(self, name), device=like.device)
            setattr(self, name, nn.Parameter(empty, requires_grad=like.requires_grad))
        with torch.no_grad():
            for e, expert in enumerate(experts):
                for name, view in zip(layout.names, self._views(e), strict=True):
                    weight = getattr(expert, name).weight
                    view.copy_(weight)
                    weight.data = view
        self.training = experts.training

    def _views(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up = self.w13.detach()[expert].chunk(2)
        return gate, up, self.w2.detach()[expert]

    def _entries(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for e in range(self.num_experts):
            yield from zip(self.layout.keys(e, prefix), self._views(e), strict=True)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination.update(self._entries(prefix))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if local_metadata.get("assign_to_params_buffers", False):
            error_msgs.append(
                f"{prefix}: experts are stacked, so load_state_dict(assign=True) cannot keep "
                "their tensors; load with assign=False"
            )
            return
        expected = dict(self._entries(prefix))
        for key, view in expected.items():
            value = state_dict.get(key)
            if value is None:
                missing_keys.append(key)
            elif value.shape != view.shape:
                error_msgs.append(
                    f"size mismatch for {key}: expected {tuple(view.shape)}, "
                    f"got {tuple(value.shape)}"
                )
            else:
                # Through the parameter, so that its version counts the write.
                with torch.no_grad():
                    view.copy_(value)
        if strict:
            found = (key for key in state_dict if key.startswith(prefix))
            unexpected_keys.extend(key for key in found if key not in expected)
