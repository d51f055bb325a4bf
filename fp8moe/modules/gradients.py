"""Gradients of a model some of whose experts are spread over ranks.

An expert's gradient is the sum over the tokens of all ranks of its ep_group; that of any other
parameter covers the tokens of one rank until DDP or FSDP averages it over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from fp8moe.modules.experts import Experts


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of every `Experts` in `model` that has an ep_group.

    What DDP and FSDP must leave alone, and what needs an optimizer parameter group of its own.
    """
    for module in model.modules():
        if isinstance(module, Experts) and module.ep_mesh is not None:
            yield from (module.w13, module.w2)


def expert_parameter_names(model: nn.Module) -> list[str]:
    """Names of `expert_parameters` in `model.named_parameters()`."""
    wanted = {id(p) for p in expert_parameters(model)}
    return [name for name, p in model.named_parameters() if id(p) in wanted]


def _local(t: torch.Tensor) -> torch.Tensor:
    to_local = getattr(t, "to_local", None)
    return t if to_local is None else to_local()


@torch.no_grad()
def reduce_expert_gradients(model: nn.Module, replicas: dist.ProcessGroup | None = None) -> None:
    """grad <- sum over replicas of grad / (ranks of ep_group * replicas): the mean over all ranks.

    Call it once per optimizer step, after backward: the gradients of experts are then scaled as
    DDP and FSDP scale all others. Adjusts main_grad where a parameter has one, else grad.

    Args:
        replicas: ranks that hold the same experts as this one, if there are more ranks than in
            ep_group; all of them call this together. None: this rank alone has them, or FSDP has
            averaged over the replicas already.

    Raises: ValueError for replicas with another rank of ep_group, which holds other experts.
    """
    others = set() if replicas is None else set(dist.get_process_group_ranks(replicas))
    for module in model.modules():
        if not isinstance(module, Experts) or module.ep_mesh is None:
            continue
        shared = others & set(dist.get_process_group_ranks(module.ep_mesh.get_group()))
        if len(shared) > 1:
            raise ValueError(
                "replicas: expected ranks that hold the same experts, got ranks "
                f"{sorted(shared)} of one ep_group"
            )
        ranks = module.ep_mesh.size() * (1 if replicas is None else replicas.size())
        for p in (module.w13, module.w2):
            main_grad = getattr(p, "main_grad", None)
            grad = p.grad if main_grad is None else main_grad
            if grad is None:
                continue
            grad = _local(grad).div_(ranks)
            if replicas is not None:
                dist.all_reduce(grad, group=replicas)


@torch.no_grad()
def grad_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """sqrt(sum of |grad|^2) over whole parameters, those sharded over ranks (DTensors) included.

    All ranks that share parameters call it together. torch.nn.utils.get_total_norm takes no mixture
    of plain tensors and DTensors, nor DTensors of different meshes.

    Returns: a float32 scalar on the parameters' device, the same on all ranks whose plain
        parameters agree.

    Raises: ValueError for a parameter whose gradient was added to main_grad and is not its grad.
    """
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_mesh.setdefault(getattr(p.grad, "device_mesh", None), []).append(p.grad)
        elif getattr(p, "grad_added_to_main_grad", False):
            raise ValueError(
                "parameters: expected gradients in grad, got a parameter of shape "
                f"{tuple(p.shape)} that has it in main_grad: move it to grad first"
            )
    norms = []
    for grads in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(grads)
        full = getattr(norm, "full_tensor", None)
        norms.append((norm if full is None else full()).float())
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """grad <- grad * min(1, max_norm / (grad_norm + 1e-6)); returns the norm before.

    Args:
        parameters, and who calls it: as for `grad_norm`.
        max_norm: more than 0.

    Raises: ValueError for max_norm, and as `grad_norm`.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected more than 0, got {max_norm}")
    parameters = list(parameters)
    norm = grad_norm(parameters)
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm
