"""Token order to expert order and back: differentiable, deterministic, without a sort or a sync."""

from __future__ import annotations

import torch

from fp8moe.functional.unfused import GatherSum, Permutation, PermuteRows

__all__ = ["Permutation", "permutation", "permute", "unpermute"]


def permutation(topk_ids: torch.Tensor, num_experts: int) -> Permutation:
    """row_of_slot[t, k] = start[e] + rank of slot t * K + k among the slots of e = topk_ids[t, k].

    Each expert's rows start at a multiple of 128 and keep the order of the slots.

    Args:
        topk_ids: (T, K) int32 or int64, 0 to num_experts; num_experts itself drops the slot.
        num_experts: E.

    Returns: the maps both ways, the experts' `group_ends` as `grouped_linear` takes them, and the
        number of tokens of each expert.

    Raises: ValueError for an id out of range (on the GPU: at a later operator).
    """
    return Permutation.of(topk_ids.contiguous(), num_experts)


def permute(x_TH: torch.Tensor, p: Permutation) -> torch.Tensor:
    """x_RH[r] = x_TH[slot_of_row[r] // K]; the gradient of x_TH is the sum over its rows.

    Args:
        x_TH: (T, H) BF16, H a multiple of 8.
        p: from `permutation`.

    Returns: (Rcap, H) BF16. Padding rows are zero; rows from `p.group_ends[-1]` on are undefined.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    if x_TH.dim() != 2 or x_TH.shape[0] != p.row_of_slot.shape[0]:
        raise ValueError(
            f"x_TH: expected ({p.row_of_slot.shape[0]}, H) for this permutation, "
            f"got {tuple(x_TH.shape)}"
        )
    return PermuteRows.apply(x_TH.contiguous(), p.row_of_slot, p.slot_of_row)


def unpermute(y_RH: torch.Tensor, p: Permutation) -> torch.Tensor:
    """y_TH[t] = sum_k y_RH[row_of_slot[t, k]], in FP32 in the order of k, rounded once.

    A plain sum: routing weights belong into the rows (see fp8moe.functional). A dropped slot adds
    zero.

    Args:
        y_RH: (Rcap, H) BF16, H a multiple of 8; only rows that hold a slot are read.
        p: from `permutation`.

    Returns: (T, H) BF16. The gradient of y_RH is zero in padding and undefined past the last group.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    if y_RH.dim() != 2 or y_RH.shape[0] != p.slot_of_row.shape[0]:
        raise ValueError(
            f"y_RH: expected ({p.slot_of_row.shape[0]}, H) for this permutation, "
            f"got {tuple(y_RH.shape)}"
        )
    return GatherSum.apply(y_RH.contiguous(), p.row_of_slot, p.slot_of_row)
