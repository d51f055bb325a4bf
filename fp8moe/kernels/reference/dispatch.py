"""Which token goes to which rank of an expert-parallel group, and what travels beside its row."""

from __future__ import annotations

import torch

from fp8moe.kernels.fp8tensor import BLOCK, ceil_div
from fp8moe.kernels.reference.permute import UNUSED

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def dispatch_maps(topk_ids: torch.Tensor, num_experts: int, ranks: int, alike: list[int]) -> Five:
    """Rows of the messages to the ranks, grouped by rank and in the order of tokens within one.

    Returns: row_of_slot, first_row_of_slot, position_of_slot, slot_of_row, sizes.
    """
    tokens, topk = topk_ids.shape
    ids = topk_ids.long()
    wrong = int(((ids < 0) | (ids > num_experts)).sum())
    row, first_row, position = (
        torch.full((tokens, topk), -1, dtype=torch.int32, device=ids.device) for _ in range(3)
    )
    slot_of_row, lines, rows, slots = [], [], 0, 0
    local = num_experts // ranks
    for rank in range(ranks):
        here = (ids >= rank * local) & (ids < (rank + 1) * local)
        first = here & (here.cumsum(1) == 1)
        of_token = rows + first.any(1).cumsum(0).int() - 1
        row = torch.where(here, of_token.unsqueeze(1), row)
        first_row = torch.where(first, of_token.unsqueeze(1), first_row)
        place = slots + here.flatten().cumsum(0).int().view_as(row) - 1
        position = torch.where(here, place, position)
        slot_of_row.append(first.flatten().nonzero().flatten().int())
        lines.append([len(slot_of_row[-1]), int(here.sum()), wrong, *alike])
        rows, slots = rows + lines[-1][0], slots + lines[-1][1]
    capacity = max(BLOCK, ceil_div(tokens * min(topk, ranks), BLOCK) * BLOCK)
    unused = row.new_full((capacity - rows,), UNUSED)
    sizes = row.new_empty((2, ranks, 3 + len(alike)))
    sizes[0] = torch.tensor(lines)
    return row, first_row, position, torch.cat([*slot_of_row, unused]), sizes


def dispatch_routing(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_row_of_slot: torch.Tensor,
    experts_per_rank: int,
    out: torch.Tensor,
) -> None:
    """out[row] = the token's weights, and its experts as numbered on the row's rank."""
    token, k = (first_row_of_slot >= 0).nonzero().unbind(1)
    ids = topk_ids.long()
    begin = ids[token, k] // experts_per_rank * experts_per_rank
    local = ids[token] - begin.unsqueeze(1)
    local[(local < 0) | (local >= experts_per_rank)] = experts_per_rank
    row = first_row_of_slot[token, k].long()
    out[row] = torch.cat([topk_weights[token].view(torch.int32), local.int()], dim=1)
