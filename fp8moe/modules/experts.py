"""Experts: the weights of E SwiGLU MLPs and their FP8 forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import check_config, check_size, check_some
from fp8moe.functional.exchange import Combine
from fp8moe.functional.sharded import local_weight
from fp8moe.modules.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Experts(nn.Module):
    """y[t] = sum_k topk_weights[t, k] * (silu(g) * u) w2[e]^T, [g | u] = x[t] w13[e]^T.

    Args:
        num_experts: E, of all ranks together.
        hidden_size: H, a multiple of 16 in FP8; of 128 for the fused path.
        intermediate_size: I, likewise.
        config: precision of each GEMM; may be replaced later (`experts.config = ...`).
        ep_group: a process group, or a one-dimensional DeviceMesh, whose ranks hold E / ranks
            experts each. All of them run forward and backward together, also with no tokens.
        combine: with ep_group, what travels back: "rows", every expert's output, summed as in one
            process, bit for bit; or "sums", one row per token and rank: faster, rounded once more.

    Parameters: w13 (E, 2I, H), gate rows then up rows; w2 (E, H, I). With ep_group they are
        DTensors of these shapes, of which this rank holds its experts.

    Shapes: forward takes x (T, H), topk_ids (T, K), topk_weights (T, K) and returns (T, H); see
        `fp8moe.swiglu_experts`.

    Raises: ValueError naming the argument, for a size that the GEMMs of config cannot take, and for
        an ep_group that does not divide the experts or that this rank is not in.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        config: FP8Config | None = None,
        ep_group: dist.ProcessGroup | DeviceMesh | None = None,
        combine: Combine = "rows",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.config = FP8Config() if config is None else config
        check_config(self.config)
        check_some("num_experts", num_experts)
        check_size("hidden_size", hidden_size, self.config)
        check_size("intermediate_size", intermediate_size, self.config)
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)
        if ep_group is not None:
            self.dispatcher = AllToAllDispatcher(
                num_experts, ep_group, combine=combine, device=device
            )
        local, h, i = len(self.dispatcher.experts), hidden_size, intermediate_size
        w13 = torch.empty(local, 2 * i, h, device=device, dtype=dtype)
        w2 = torch.empty(local, h, i, device=device, dtype=dtype)
        self.w13, self.w2 = self.dispatcher.parameter(w13), self.dispatcher.parameter(w2)
        self.reset_parameters()

    @property
    def ep_mesh(self) -> DeviceMesh | None:
        """The mesh of ep_group; None if all experts are here."""
        return getattr(self.dispatcher, "mesh", None)

    def reset_parameters(self, std: float = 0.02, out_std: float | None = None) -> None:
        """w13 ~ normal(0, std), w2 ~ normal(0, out_std or std), both cut at 3 std.

        Drawn expert by expert: ranks of an ep_group that start from the same seed hold the weights
        that one process would draw.
        """
        here = self.dispatcher.experts
        for w, s in ((self.w13, std), (self.w2, std if out_std is None else out_std)):
            local = local_weight(w.detach())
            elsewhere = torch.empty_like(local[0])
            for e in range(self.num_experts):
                expert = local[e - here.start] if e in here else elsewhere
                nn.init.trunc_normal_(expert, std=s, a=-3 * s, b=3 * s)

    @torch.no_grad()
    def shard(
        self, ep_group: dist.ProcessGroup | DeviceMesh, *, combine: Combine = "rows"
    ) -> Experts:
        """Spread experts that are all here, the same on every rank, over the ranks of ep_group.

        The parameters are replaced: make the optimizer afterwards.

        Raises: ValueError as the constructor; RuntimeError if they are spread over ranks already.
        """
        if self.ep_mesh is not None:
            raise RuntimeError(f"shard: expected experts without ep_group, got {self.ep_mesh}")
        dispatcher = AllToAllDispatcher(
            self.num_experts, ep_group, combine=combine, device=self.w13.device
        )
        here = dispatcher.experts
        for name in ("w13", "w2"):
            w = getattr(self, name)
            part = dispatcher.parameter(w.detach()[here.start : here.stop].clone())
            setattr(self, name, part.requires_grad_(w.requires_grad))
        self.dispatcher = dispatcher
        return self

    def _check(self, x_TH: torch.Tensor) -> None:
        if x_TH.dim() != 2 or x_TH.shape[1] != self.hidden_size:
            raise ValueError(f"x_TH: expected (T, {self.hidden_size}), got {tuple(x_TH.shape)}")

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Any:
        """Start sending the tokens to the ranks of their experts.

        Returns: forward's `tokens`, None if the experts are all here.
        """
        self._check(x_TH)
        return self.dispatcher.start(
            x_TH, topk_ids_TK, topk_weights_TK, self.config, self.intermediate_size
        )

    def forward(
        self,
        x_TH: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        tokens: Any = None,
    ) -> torch.Tensor:
        self._check(x_TH)
        return self.dispatcher.finish(
            tokens, x_TH, topk_ids_TK, topk_weights_TK, self.w13, self.w2, self.config
        )

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, "
            f"fprop={c.fprop}, dgrad={c.dgrad}, wgrad={c.wgrad}"
            + ("" if self.ep_mesh is None else f", ep={self.ep_mesh.size()}")
        )
