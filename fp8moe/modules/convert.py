"""replace_experts: swaps the expert layers of a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import check_config, check_size
from fp8moe.modules.expert_list import NotConvertible
from fp8moe.modules.experts import Experts
from fp8moe.modules.moe_block import ListedMoE, inspect_block
from fp8moe.modules.stacked import StackedExperts, misfit, unsupported

_FP8 = FP8Config()


@dataclass(frozen=True)
class Replaced:
    """One expert layer that was replaced: its name in the model, old class, sizes and layout."""

    name: str
    kind: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    weights: str

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.num_experts} experts {self.hidden_size} x "
            f"{self.intermediate_size}, {self.weights}"
        )


@dataclass(frozen=True)
class Left:
    """One expert layer that was left as it is: its name in the model, class, and why."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_experts` did. Printed: equal layers on one line.

    Args:
        replaced: layers that now run fp8moe.
        left: layers that look like experts and run what they ran before.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.left)
        lines = [f"replace_experts: {len(self.replaced)} of {total} expert layers replaced"]
        for verb, entries in (("replaced", self.replaced), ("left as it is", self.left)):
            same: dict[str, list[str]] = {}
            for entry in entries:
                same.setdefault(str(entry), []).append(entry.name)
            for text, names in same.items():
                where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
                lines.append(f"  {verb}: {len(names)} x {text} ({where})")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Step:
    """A checked replacement that is still to be made."""

    entry: Replaced
    old: nn.Module
    build: Callable[[], nn.Module]


def _check_unhooked(module: nn.Module) -> None:
    for part in module.modules():
        hooks = (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        )
        if any(hooks) or "forward" in vars(part):
            raise NotConvertible(
                f"{type(part).__name__} has hooks or a wrapped forward, which would be lost; "
                "replace the experts first"
            )


def _stacked_step(name: str, experts: Any, config: FP8Config) -> _Step:
    reason = unsupported(experts) or misfit(experts)
    if reason is not None:
        raise NotConvertible(reason)
    e, hidden, intermediate = experts.down_proj.shape
    check_size("hidden size", hidden, config)
    entry = Replaced(
        name, type(experts).__name__, e, hidden, intermediate, "gate_up_proj/down_proj kept"
    )
    return _Step(entry, experts, lambda: StackedExperts(experts, config))


def _listed_step(name: str, block: nn.Module, config: FP8Config) -> _Step:
    layout = inspect_block(block, config)
    sizes = layout.experts
    entry = Replaced(
        name,
        type(block).__name__,
        sizes.num_experts,
        sizes.hidden_size,
        sizes.intermediate_size,
        f"{sizes.key_names} stacked",
    )
    return _Step(entry, block, lambda: ListedMoE(block, layout, config))


def _is_stacked(module: nn.Module) -> bool:
    weights = (getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj"))
    return any(isinstance(w, torch.Tensor) and w.dim() == 3 for w in weights)


def _has_list(module: nn.Module) -> bool:
    experts = getattr(module, "experts", None)
    return isinstance(experts, nn.ModuleList) and len(experts) > 0


def _unknown_step(name: str, module: nn.Module, config: FP8Config) -> _Step:
    found = ", ".join(n for n, p in module.named_parameters(recurse=False) if p.dim() == 3)
    raise NotConvertible(f"stacked weights ({found}) are not called gate_up_proj and down_proj")


def _is_unknown_stack(module: nn.Module) -> bool:
    named = "expert" in type(module).__name__.lower()
    return named and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[..., _Step]]]:
    inside: set[nn.Module] = set()  # parts of what is a candidate itself
    for name, module in model.named_modules():
        if module in inside or isinstance(module, Experts | StackedExperts | ListedMoE):
            inside.update(module.modules())
        elif _is_stacked(module):
            yield name, module, _stacked_step
        elif _has_list(module):
            inside.update(module.modules())
            yield name, module, _listed_step
        elif _is_unknown_stack(module):
            yield name, module, _unknown_step


def _plan(model: nn.Module, config: FP8Config) -> tuple[list[_Step], list[Left]]:
    steps, left = [], []
    for name, module, check in _candidates(model):
        try:
            if module is model:
                raise NotConvertible("this is the model itself; pass a module that contains it")
            _check_unhooked(module)
            steps.append(check(name, module, config))
        except (NotConvertible, ValueError) as error:
            left.append(Left(name, type(module).__name__, str(error)))
    return steps, left


def _places(model: nn.Module, modules: set[nn.Module]) -> dict[nn.Module, list[tuple[Any, str]]]:
    """Every parent and name under which each of the modules hangs in the model."""
    found: dict[nn.Module, list[tuple[Any, str]]] = {module: [] for module in modules}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in modules and child is not None:
                found[child].append((parent, name))
    return found


def replace_experts(model: nn.Module, *, config: FP8Config = _FP8) -> ReplacementReport:
    """Every supported expert layer of the model computes `fp8moe.swiglu_experts`, in place.

    Two kinds of layers are known:

    - a module with gate_up_proj (E, 2I, H) and down_proj (E, H, I), called with hidden states and
      their routing, as in Hugging Face transformers. Parameters stay the same objects under the
      same names.
    - a block with `experts`, an nn.ModuleList of SwiGLU MLPs (gate_proj/up_proj/down_proj or
      w1/w3/w2, no biases), and `gate` or `router`: an nn.Linear (softmax, top-k) or a module that
      returns expert ids and weights; with or without `shared_expert(s)`. Weights are stacked into
      new parameters w13 and w2: create the optimizer afterwards. State dicts keep one key per
      expert, so old checkpoints load into the new model and new ones into the old.

    A block, and a module of the first kind that transformers does not describe, is replaced only
    if its output on random tokens, in evaluation mode, is that of the formula. All checks come
    before the first change; if stacking then fails, for lack of memory say, the model has its old
    layers again. Stacking needs the memory of one layer's experts.

    Prints the report.

    Args:
        model: any module that contains expert layers.
        config: precision of each GEMM.

    Returns: what was replaced, and what was left and why.

    Raises: ValueError for a config that is not an FP8Config.
    """
    check_config(config)
    steps, left = _plan(model, config)
    places = _places(model, {step.old for step in steps})
    done: list[_Step] = []
    try:
        for step in steps:
            done.append(step)
            new = step.build()
            for parent, name in places[step.old]:
                setattr(parent, name, new)
    except BaseException:
        for step in done:
            for parent, name in places[step.old]:
                setattr(parent, name, step.old)
        raise
    report = ReplacementReport(tuple(step.entry for step in steps), tuple(left))
    print(report)
    return report
