"""Where tokens meet their experts: in this process, or on the ranks of a group that share them.

With an `ep_group` of n ranks each rank holds E/n experts, and every layer sends its tokens to their
experts and the results back (see fp8moe.functional.expert_parallel). The expert weights are
DTensors of the unsharded shape, split along E: torch.distributed.checkpoint saves and loads them,
and the optimizer's state, as one tensor, whatever the number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, get_args

import torch
import torch.distributed as dist
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional import swiglu_experts
from fp8moe.functional.exchange import Combine
from fp8moe.functional.expert_parallel import Dispatched, dispatch, expert_parallel_swiglu

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Tensor = torch.Tensor


class Dispatcher(Protocol):
    """How one batch of tokens reaches the experts.

        tokens = dispatcher.start(x, topk_ids, topk_weights, config, intermediate_size)
        ...                                       # work that need not wait for the tokens
        y = dispatcher.finish(tokens, x, topk_ids, topk_weights, w13, w2, config)

    Attributes:
        experts: which of the layer's experts are here.
    """

    experts: range

    def start(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        config: FP8Config,
        intermediate_size: int,
    ) -> Any: ...

    def finish(
        self,
        tokens: Any,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        config: FP8Config,
    ) -> Tensor: ...

    def parameter(self, local: Tensor) -> nn.Parameter:
        """The parameter for this rank's experts' weights (local E, N, K)."""
        ...


class LocalDispatcher:
    """All experts are here: there is nothing to start."""

    def __init__(self, num_experts: int) -> None:
        self.experts = range(num_experts)

    def start(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        config: FP8Config,
        intermediate_size: int,
    ) -> None:
        return None

    def finish(
        self,
        tokens: None,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        config: FP8Config,
    ) -> Tensor:
        return swiglu_experts(x, topk_ids, topk_weights, w13, w2, config=config)

    def parameter(self, local: Tensor) -> nn.Parameter:
        return nn.Parameter(local)


class AllToAllDispatcher:
    """The experts are spread over the ranks of a group, in order, as many on each.

    Args:
        num_experts: E of all ranks together.
        ep_group: a process group or a one-dimensional DeviceMesh.
        combine: "rows" or "sums"; see `fp8moe.functional.exchange.Combine`.
        device: of the weights.

    Raises: ValueError naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        num_experts: int,
        ep_group: dist.ProcessGroup | DeviceMesh,
        *,
        combine: Combine = "rows",
        device: torch.device | str | None = None,
    ) -> None:
        if combine not in get_args(Combine):
            raise ValueError(f"combine: expected 'rows' or 'sums', got {combine!r}")
        self.num_experts, self.combine = num_experts, combine
        self.mesh = mesh_of(ep_group, torch.empty(0, device=device).device.type)
        if num_experts % self.mesh.size():
            raise ValueError(
                f"num_experts: expected a multiple of the {self.mesh.size()} ranks of ep_group, "
                f"got {num_experts}"
            )
        count = num_experts // self.mesh.size()
        rank = self.mesh.get_local_rank()
        self.experts = range(rank * count, (rank + 1) * count)

    def start(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        config: FP8Config,
        intermediate_size: int,
    ) -> Dispatched:
        return dispatch(
            x,
            topk_ids,
            topk_weights,
            self.num_experts,
            intermediate_size,
            config=config,
            group=self.mesh.get_group(),
            combine=self.combine,
        )

    def finish(
        self,
        tokens: Dispatched | None,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        config: FP8Config,
    ) -> Tensor:
        if tokens is None:
            tokens = self.start(x, topk_ids, topk_weights, config, w2.shape[2])
        return expert_parallel_swiglu(tokens, x, topk_weights, w13, w2)

    def parameter(self, local: Tensor) -> nn.Parameter:
        from torch.distributed.tensor import DTensor, Shard

        return nn.Parameter(DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False))


def mesh_of(ep_group: dist.ProcessGroup | DeviceMesh, device_type: str) -> DeviceMesh:
    """The one-dimensional DeviceMesh of `ep_group`.

    Args:
        device_type: of the weights that it shards: "cpu", "cuda" or "meta", which becomes the
            group's.

    Raises: ValueError naming ep_group: not a group, not initialised, without this rank, a mesh with
        more dimensions, or one that cannot reach the weights.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "ep_group: expected torch.distributed to be initialised (init_process_group), it is not"
        )
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(ep_group, DeviceMesh):
        if ep_group.ndim != 1:
            raise ValueError(
                f"ep_group: expected a mesh of one dimension, got {ep_group.ndim}: "
                f"{ep_group}; take one of its dimensions by name, mesh['ep']"
            )
        if device_type not in ("meta", ep_group.device_type):  # DTensor would move them
            raise ValueError(f"ep_group: expected a mesh of {device_type} devices, got {ep_group}")
        if ep_group.get_coordinate() is None:
            raise ValueError(f"ep_group: expected a mesh with this rank in it, got {ep_group}")
        mesh = ep_group
    elif isinstance(ep_group, dist.ProcessGroup):
        backend = dist.get_backend(ep_group)
        if (device_type, backend) in (("cpu", "nccl"), ("cuda", "gloo")):
            raise ValueError(
                f"ep_group: expected a backend that moves {device_type} tensors, got {backend}"
            )
        if device_type == "meta":
            only_cpu = backend == "gloo" or not torch.cuda.is_available()
            device_type = "cpu" if only_cpu else "cuda"
        mesh = DeviceMesh.from_group(ep_group, device_type)
    else:
        # new_group() returns no ProcessGroup to ranks that are not in it.
        raise ValueError(
            "ep_group: expected a ProcessGroup with this rank in it or a DeviceMesh, "
            f"got {ep_group!r}"
        )
    return mesh
