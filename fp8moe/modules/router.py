"""Router: which experts a token goes to, with which weights, and how the load stays balanced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from fp8moe.functional.arguments import check_some
from fp8moe.functional.autocast import autocast_off

ScoreFunction = Literal["softmax", "sigmoid"]


class RouterOutput(NamedTuple):
    """What a Router decides for T tokens.

    Args:
        topk_ids: (T, K) int64, best first.
        topk_weights: (T, K) float32, differentiable.
        balance_loss, z_loss: float32 scalars, already times their coefficients; 0 where those are.
        num_tokens_per_expert: (E,) int64.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    num_tokens_per_expert: torch.Tensor

    @property
    def aux_loss(self) -> torch.Tensor:
        """What to add to the training loss."""
        return self.balance_loss + self.z_loss


class _LinearFP32(torch.autograd.Function):
    """x w^T in FP32; keeps x for backward as it came, not its FP32 copy (4 H bytes a token)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x.float() @ w.float().t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        with autocast_off(dy.device):
            dx = (dy @ w.float()).to(x.dtype) if need_x else None
            dw = (dy.t() @ x.float()).to(w.dtype) if need_w else None
        return dx, dw


class Router(nn.Module):
    """topk_weights[t, k] = scale * score[t, e] (/ sum over k), e = topk_ids[t, k] the best scores.

    score = softmax(x gate^T) or sigmoid(x gate^T), in FP32 whatever autocast says.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K, experts per token.
        score_func: "softmax" (Mixtral, Qwen3, OLMoE) or "sigmoid" (DeepSeek-V3).
        renormalize: divide a token's K weights by their sum.
        routed_scaling_factor: multiplies the weights last.
        num_groups, topk_groups: experts fall into num_groups equal groups, and a token may choose
            only in its topk_groups best ones. A group's score is the sum of its two best scores
            with sigmoid, its best with softmax.
        bias_update_speed: not None: keep a bias per expert that is added to the scores for the
            choice alone, never to the weights. `update_bias` moves it by this much.
        balance_loss_coeff: of E * sum_e f_e P_e, f_e the share of slots that go to e and P_e the
            mean score (sigmoid: scores over their sum); 1 when balanced.
        z_loss_coeff: of the mean of logsumexp(logits)^2.
        jitter: in training, multiply the router's input by uniform(1 - jitter, 1 + jitter).

    Shapes: forward takes x (T, H), any float dtype.

    Raises: ValueError naming the argument, for sizes that do not fit together and for negative
        coefficients.

    Source: Switch Transformer (arXiv 2101.03961) for the balance loss and jitter, ST-MoE (arXiv
        2202.08906) for the z-loss, DeepSeek-V3 (arXiv 2412.19437) sections 2.1.2 for sigmoid
        scores, bias and groups, DeepSeek-V2 (arXiv 2405.04434) for softmax groups.
    """

    expert_bias: torch.Tensor | None
    accumulated_load: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_func: ScoreFunction = "softmax",
        renormalize: bool = True,
        routed_scaling_factor: float = 1.0,
        num_groups: int = 1,
        topk_groups: int = 1,
        bias_update_speed: float | None = None,
        balance_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score_func not in ("softmax", "sigmoid"):
            raise ValueError(f"score_func: expected 'softmax' or 'sigmoid', got {score_func!r}")
        check_some("hidden_size", hidden_size)
        check_some("num_experts", num_experts)
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_groups: expected a divisor of {num_experts}, got {num_groups}")
        if not 1 <= topk_groups <= num_groups:
            raise ValueError(f"topk_groups: expected 1 to {num_groups}, got {topk_groups}")
        eligible = num_experts // num_groups * topk_groups
        if not 1 <= top_k <= eligible:
            raise ValueError(f"top_k: expected 1 to {eligible} (eligible experts), got {top_k}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected 0 to 1 (excluded), got {jitter}")
        for name, value in (
            ("bias_update_speed", bias_update_speed),
            ("balance_loss_coeff", balance_loss_coeff),
            ("z_loss_coeff", z_loss_coeff),
        ):
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score_func, self.renormalize = score_func, renormalize
        self.routed_scaling_factor = routed_scaling_factor
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.bias_update_speed = bias_update_speed
        self.balance_loss_coeff, self.z_loss_coeff = balance_loss_coeff, z_loss_coeff
        self.jitter = jitter
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        bias = load = None
        if bias_update_speed is not None:
            bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
            load = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("expert_bias", bias)
        # No buffer: DDP overwrites those with rank 0's before every forward.
        self.accumulated_load = load
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """gate ~ normal(0, std) cut at 3 std; the bias and the load are zero."""
        nn.init.trunc_normal_(self.gate.weight, std=std, a=-3 * std, b=3 * std)
        for state in (self.expert_bias, self.accumulated_load):
            if state is not None:
                state.zero_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        # module.to(bfloat16) must not round the bias: its steps are far below a BF16 ulp of it.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != torch.float32:  # type: ignore[union-attr]
            self.expert_bias = bias.to(self.expert_bias.device)  # type: ignore[union-attr]
        if self.accumulated_load is not None:
            self.accumulated_load = fn(self.accumulated_load)
        return self

    def forward(self, x_TH: torch.Tensor) -> RouterOutput:
        if x_TH.dim() != 2 or x_TH.shape[1] != self.hidden_size:
            raise ValueError(f"x_TH: expected (T, {self.hidden_size}), got {tuple(x_TH.shape)}")
        if not x_TH.is_floating_point():
            raise ValueError(f"x_TH: expected a floating dtype, got {x_TH.dtype}")
        if self.training and self.jitter:
            noise = torch.empty_like(x_TH).uniform_(1 - self.jitter, 1 + self.jitter)
            x_TH = x_TH * noise
        with autocast_off(x_TH.device):
            logits_TE = _LinearFP32.apply(x_TH, self.gate.weight)
            if self.score_func == "softmax":
                scores_TE = logits_TE.softmax(dim=-1)
            else:
                scores_TE = logits_TE.sigmoid()
            topk_ids = self._choose(scores_TE.detach())
            weights_TK = scores_TE.gather(1, topk_ids)
            if self.renormalize:
                # The floor only matters where sigmoid underflows for all K experts of a token.
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            weights_TK = weights_TK * self.routed_scaling_factor

            flat_ids = topk_ids.reshape(-1)
            load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=x_TH.device)
            load_E = load_E.scatter_add(0, flat_ids, torch.ones_like(flat_ids))
            if self.accumulated_load is not None and self.training and torch.is_grad_enabled():
                if self.accumulated_load.device != load_E.device:  # FSDP moved only what it knows
                    self.accumulated_load = self.accumulated_load.to(load_E.device)
                self.accumulated_load.add_(load_E)
            balance_loss = self._balance_loss(scores_TE, load_E)
            return RouterOutput(topk_ids, weights_TK, balance_loss, self._z_loss(logits_TE), load_E)

    def _choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias
        if self.num_groups > 1:
            groups = scores_TE.unflatten(-1, (self.num_groups, -1))
            best = min(2 if self.score_func == "sigmoid" else 1, groups.shape[-1])
            group_scores = groups.topk(best, dim=-1).values.sum(dim=-1)
            kept = group_scores.topk(self.topk_groups, dim=-1).indices
            index = torch.arange(self.num_groups, device=kept.device)
            closed = (kept.unsqueeze(-1) != index).all(dim=1)
            scores_TE = groups.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
        return scores_TE.topk(self.top_k, dim=-1).indices

    def _balance_loss(self, scores_TE: torch.Tensor, load_E: torch.Tensor) -> torch.Tensor:
        if self.balance_loss_coeff == 0:
            return scores_TE.new_zeros(())
        if self.score_func == "sigmoid":
            scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        tokens = max(1, scores_TE.shape[0])
        share_E = load_E.float() / (tokens * self.top_k)
        mean_E = scores_TE.sum(dim=0) / tokens
        return self.balance_loss_coeff * self.num_experts * (share_E * mean_E).sum()

    def _z_loss(self, logits_TE: torch.Tensor) -> torch.Tensor:
        if self.z_loss_coeff == 0:
            return logits_TE.new_zeros(())
        z = logits_TE.logsumexp(dim=-1).square().sum() / max(1, logits_TE.shape[0])
        return self.z_loss_coeff * z

    @torch.no_grad()
    def update_bias(self, process_group: dist.ProcessGroup | None = None) -> None:
        """bias[e] += speed * sign(mean load - load[e]); then the load starts again from zero.

        Call it once per optimizer step. The load is what forward has counted since the last call,
        in training with gradients enabled; recomputation under activation checkpointing counts a
        token twice, which changes no sign.

        Args:
            process_group: sum the load over its ranks first, so that all of them move alike.

        Raises: RuntimeError for a router without bias.

        Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; Wang et al. (arXiv 2408.15664).
        """
        if self.expert_bias is None or self.accumulated_load is None:
            raise RuntimeError("update_bias: expected a Router with bias_update_speed, got None")
        if process_group is not None:
            dist.all_reduce(self.accumulated_load, group=process_group)
        load_E = self.accumulated_load.double()
        self.expert_bias.add_((load_E.mean() - load_E).sign(), alpha=self.bias_update_speed or 0.0)
        self.accumulated_load.zero_()

    def extra_repr(self) -> str:
        return f"score_func={self.score_func}, top_k={self.top_k}, groups={self.num_groups}"
