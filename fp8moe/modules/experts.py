"""Experts: the weights of E SwiGLU MLPs and their FP8 forward and backward."""

from __future__ import annotations

import torch
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional import swiglu_experts
from fp8moe.functional.arguments import check_config, check_size, check_some


class Experts(nn.Module):
    """y[t] = sum_k topk_weights[t, k] * (silu(g) * u) w2[e]^T, [g | u] = x[t] w13[e]^T.

    Args:
        num_experts: E.
        hidden_size: H, a multiple of 16 in FP8; of 128 for the fused path.
        intermediate_size: I, likewise.
        config: precision of each GEMM; may be replaced later (`experts.config = ...`).

    Parameters: w13 (E, 2I, H), gate rows then up rows; w2 (E, H, I).

    Shapes: forward takes x (T, H), topk_ids (T, K), topk_weights (T, K) and returns (T, H); see
        `fp8moe.swiglu_experts`.

    Raises: ValueError naming the argument, for a size that the GEMMs of config cannot take.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        config: FP8Config | None = None,
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
        w13 = torch.empty(
            num_experts, 2 * intermediate_size, hidden_size, device=device, dtype=dtype
        )
        w2 = torch.empty(num_experts, hidden_size, intermediate_size, device=device, dtype=dtype)
        self.w13, self.w2 = nn.Parameter(w13), nn.Parameter(w2)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, out_std: float | None = None) -> None:
        """w13 ~ normal(0, std), w2 ~ normal(0, out_std or std), both cut at 3 std."""
        for w, s in ((self.w13, std), (self.w2, std if out_std is None else out_std)):
            nn.init.trunc_normal_(w, std=s, a=-3 * s, b=3 * s)

    def forward(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        return swiglu_experts(
            x_TH, topk_ids_TK, topk_weights_TK, self.w13, self.w2, config=self.config
        )

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, "
            f"fprop={c.fprop}, dgrad={c.dgrad}, wgrad={c.wgrad}"
        )
