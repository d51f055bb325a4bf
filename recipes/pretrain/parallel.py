"""The processes of a run: one, or several that share its batches and its experts.

    torchrun --nproc-per-node 2 -m recipes.pretrain --ep 2

Each rank reads its part of every micro-batch and holds its part of the experts; everything else is
the same on all ranks, which DistributedDataParallel sees to. Rank 0 writes the run's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fp8moe.modules import expert_parameter_names, reduce_expert_gradients

from .config import Config, UserError


class Ranks:
    """This process among those of the run."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.size > 1 else None

    def part(self, items: Tensor) -> Tensor:
        """This rank's share of a micro-batch, along the first dimension."""
        return items.chunk(self.size)[self.rank]

    def replicate(self, model: nn.Module) -> nn.Module:
        """`model` with a forward whose backward averages all gradients but the experts'."""
        if self.size == 1:
            return model
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, expert_parameter_names(model)
        )
        return DistributedDataParallel(model)

    def reduce_experts(self, model: nn.Module) -> None:
        """Scales the experts' gradients as `replicate` scales all others."""
        if self.size > 1:
            reduce_expert_gradients(model)

    def sum(self, values: Tensor) -> Tensor:
        """values summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: all ranks get the same answer."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=_device())))

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def _device() -> torch.device:
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


def start(config: Config) -> Ranks:
    """Joins the processes that torchrun started.

    Raises:
        UserError: their number is not ``config.ep``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != config.ep:
        raise UserError(
            f"--ep: expected as many as processes ({size}), got {config.ep}; start with "
            f"torchrun --nproc-per-node {config.ep} -m recipes.pretrain --ep {config.ep}"
        )
    if size == 1:
        return Ranks()
    if config.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), size)


def end() -> None:
    """Leaves the processes, if there are others, when all have done their work.

    Not after an error: NCCL would wait here for processes that wait for this one. Its exit lets
    torchrun end them.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def whole(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors as one process would hold them; all ranks call it together."""
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()
    }


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of a parameter's shape, spread over ranks as the parameter is."""
    value = value.to(parameter.device)
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(parameter, "placements", None)
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
