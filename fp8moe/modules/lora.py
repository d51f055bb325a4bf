"""Low-rank updates of expert weights: the parameters that are trained when experts are frozen."""

from __future__ import annotations

import math

import torch
from torch import nn

from fp8moe.functional.frozen import RANK_UNIT, LowRank


class LowRankUpdate(nn.Module):
    """W[e] = w[e] + (alpha / rank) * lora_B[e] lora_A[e], one update for each of E experts.

    Args:
        num_experts: E.
        out_features, in_features: N and K of the weight (E, N, K) that is updated.
        rank: r, a multiple of 8.
        alpha: the update is multiplied by alpha / rank.
        dropout: of the update's input, while training.
        dtype: of the parameters; their gradients have it too. The GEMMs run in BF16.

    Parameters: lora_A (E, r, K), uniform in +-1/sqrt(K); lora_B (E, N, r), zero: the update starts
        as nothing.

    Raises: ValueError naming the argument.

    Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1; A as PEFT initialises it.
    """

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_lora(rank, alpha, dropout, dtype)
        self.rank, self.alpha, self.dropout = rank, float(alpha), float(dropout)
        a = torch.empty(num_experts, rank, in_features, device=device, dtype=dtype)
        b = torch.empty(num_experts, out_features, rank, device=device, dtype=dtype)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """lora_A ~ uniform(-1/sqrt(K), 1/sqrt(K)); lora_B is zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[2])
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def low_rank(self) -> LowRank:
        """The factors as `fp8moe.functional.frozen` takes them."""
        dropout = self.dropout if self.training else 0.0
        return LowRank(self.lora_A, self.lora_B, self.scaling, dropout)

    def delta(self, expert: int) -> torch.Tensor:
        """scaling * B[e] A[e], (N, K) float32, without a gradient."""
        a, b = self.lora_A.detach()[expert].float(), self.lora_B.detach()[expert].float()
        return self.scaling * (b @ a)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def check_lora(rank: int, alpha: float, dropout: float, dtype: torch.dtype) -> None:
    """Raises: ValueError for settings that LowRankUpdate cannot take."""
    if not isinstance(rank, int) or rank < RANK_UNIT or rank % RANK_UNIT:
        raise ValueError(f"rank: expected a positive multiple of {RANK_UNIT}, got {rank!r}")
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha: expected a positive number, got {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout!r}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
