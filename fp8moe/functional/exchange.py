"""The all-to-all of one batch over the ranks of an expert-parallel group, and its way back.

Rank r of n holds the experts r * E/n to (r + 1) * E/n - 1. A token goes once to every rank that has
one of its experts, however many of them it has there. What arrives is ordered by source rank and,
within a rank, by token: the token order of the ranks' batches laid end to end. So an expert sees
the rows, and the order of rows, that it would see if all of those tokens were in one process.

What travels in FP8 is two messages: the data, which the receiver uses where it arrives, and beside
it the scales (in forward with the routing weights and expert ids). In one message every row would
have to be copied out of its packet before a kernel could read it.

The sizes of the messages differ from rank to rank and must be known on the host: `Exchange.plan`
reads them, which is the only host synchronisation. The way back and the whole backward reuse them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from fp8moe.functional.saved import restore
from fp8moe.functional.unfused import Permutation
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, padded_capacity
from fp8moe.kernels.permute import gather_sum

Tensor = torch.Tensor

Combine = Literal["rows", "sums"]
"""What comes back. "rows": every expert's output row, to be summed by the token's owner in the
order of k, bit for bit as in one process. "sums": one row per token and rank, summed there in FP32
and rounded to BF16; fewer bytes where a rank has several of a token's experts."""

_COMBINE = get_args(Combine)


class Splits(NamedTuple):
    """Rows for each rank of the group and rows from it."""

    to: list[int]
    of: list[int]

    def back(self) -> Splits:
        return Splits(self.of, self.to)


class Pending:
    """A message on its way. `wait` returns what this rank gets, and may be called once."""

    def __init__(self, work: Any, received: Tensor, sent: Tensor) -> None:
        self._work, self._received, self._sent = work, received, sent

    def wait(self) -> Tensor:
        self._work.wait()
        received = self._received
        del self._work, self._received, self._sent
        return received


class Returned:
    """A message on its way back, and how its owner reads it."""

    def __init__(
        self, pending: Pending, index: Tensor, read: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._pending, self._index, self._read = pending, index, read

    def wait(self) -> Tensor:
        return self._read(self._pending.wait(), self._index)


def _words(t: Tensor) -> Tensor:
    """t in units of 8 bytes: rows are copied by index, and index kernels move one unit a thread."""
    return t.view(torch.int64)


class _Order(NamedTuple):
    """Where a batch's slots come when they are grouped by rank, in slot order within a rank.

    Args:
        row: (T, K) int32, the message row of the slot's token to the slot's rank, -1 if dropped.
        first_row: the same, but -1 where an earlier slot of the token has that row.
        position: (T, K) int32, the slot's place among all slots, -1 if dropped.
        rows, slots: (ranks,) int32, how many of each go to each rank.
    """

    row: Tensor
    first_row: Tensor
    position: Tensor
    rows: Tensor
    slots: Tensor

    @classmethod
    def of(cls, rank: Tensor, ranks: int) -> _Order:
        """rank: (T, K) int64, 0 to ranks; ranks itself drops the slot. Few and small operations:
        the host launches them while the device has little else to do."""
        rank_KT = rank.t()
        # One row per rank, the last for dropped slots: it comes after all others and shifts none.
        slots = torch.zeros((ranks + 1, len(rank)), dtype=torch.int32, device=rank.device)
        slots.scatter_add_(0, rank_KT, slots.new_ones(1).expand(rank_KT.shape))
        rows = (slots > 0).int()
        before = torch.stack([rows, slots])
        before = before.flatten(1).cumsum(1, dtype=torch.int32).view_as(before) - before
        row, position = before.gather(1, rank_KT.expand(2, -1, -1)).transpose(1, 2)
        same = rank.unsqueeze(2) == rank.unsqueeze(1)
        earlier = same.tril(-1).sum(dim=2, dtype=torch.int32)
        dropped = rank == ranks
        row = row.masked_fill(dropped, -1).contiguous()
        return cls(
            row,
            row.masked_fill(earlier > 0, -1),
            (position + earlier).masked_fill(dropped, -1).contiguous(),
            rows[:ranks].sum(dim=1, dtype=torch.int32),
            slots[:ranks].sum(dim=1, dtype=torch.int32),
        )


def _sum_of_rows(rows: Tensor, index: Tensor) -> Tensor:
    if rows.shape[0] == 0:  # every slot of the batch is dropped, or there is none
        return rows.new_zeros((index.shape[0], rows.shape[1]))
    return gather_sum(rows, index)


def _sum_of_words(words: Tensor, index: Tensor) -> Tensor:
    return _sum_of_rows(words.view(torch.bfloat16), index)


def _value_of_slot(values: Tensor, index: Tensor) -> Tensor:
    if values.shape[0] == 0:
        return values.new_zeros(index.shape)
    return values.gather(0, index.clamp_min(0).long()).masked_fill_(index < 0, 0.0)


class Exchange:
    """What each rank sends where. Made by `plan`, on all ranks of the group together.

    Attributes:
        rows: Splits of the messages to the experts, one row per token and rank.
        slots: Splits in units of (token, expert) pairs.
        combine: see `Combine`.
    """

    group: dist.ProcessGroup
    combine: Combine
    num_local_experts: int
    rows: Splits
    slots: Splits
    # Of the tokens that this rank owns.
    token_of_row: Tensor  # (rows sent,) int64
    row_of_slot: Tensor  # (T, K) int32, the sent row that serves a slot, -1 if dropped
    first_row_of_slot: Tensor  # the same, but -1 where an earlier slot of the token has that row
    position_of_slot: Tensor  # (T, K) int32, where a slot comes back with combine="rows"
    # Of what this rank received: set by `receive`.
    permutation: Permutation
    returned_row: Tensor  # (slots received,) int64, permuted row of each, with combine="rows"

    @classmethod
    def plan(
        cls,
        topk_ids: Tensor,
        num_experts: int,
        group: dist.ProcessGroup,
        combine: Combine,
        **alike: int,
    ) -> Exchange:
        """Which token goes where; exchanges the sizes and reads them on the host.

        Args:
            topk_ids: (T, K) int32 or int64, 0 to num_experts, which drops the slot. T may differ
                from rank to rank and be zero, K may not.
            alike: what else must be the same on all ranks, by name.

        Raises: ValueError, on every rank alike, for an id out of range on any of them and for what
            must be the same and is not.
        """
        self, ranks = cls(), group.size()
        self.group, self.combine = group, combine
        self.num_local_experts = num_experts // ranks
        tokens, topk = topk_ids.shape

        ids = topk_ids.long()
        bad = (ids < 0) | (ids > num_experts)
        order = _Order.of((ids // self.num_local_experts).masked_fill(bad, ranks), ranks)
        self.row_of_slot, self.first_row_of_slot = order.row, order.first_row
        self.position_of_slot = order.position

        alike = {"K": topk, "E": num_experts, "combine": _COMBINE.index(combine), **alike}
        sent = torch.empty((ranks, 3 + len(alike)), dtype=torch.int64, device=ids.device)
        sent[:, 0], sent[:, 1], sent[:, 2] = order.rows, order.slots, bad.sum()
        for i, value in enumerate(alike.values()):  # fills: a copy from the host would wait
            sent[:, 3 + i] = value
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        to, of = torch.stack([sent, received]).tolist()
        cls._check(of, num_experts, list(alike))
        self.rows = Splits([r[0] for r in to], [r[0] for r in of])
        self.slots = Splits([r[1] for r in to], [r[1] for r in of])

        # A slot that starts no row of its own writes to the last place, which is cut off.
        count = sum(self.rows.to)
        place = self.first_row_of_slot.long()
        place = torch.where(place < 0, count, place)
        token = torch.arange(tokens, device=ids.device).unsqueeze(1).expand_as(place)
        scattered = place.new_zeros(count + 1).scatter_(0, place.flatten(), token.flatten())
        self.token_of_row = scattered[:count]
        return self

    @staticmethod
    def _check(of: list[list[int]], num_experts: int, alike: list[str]) -> None:
        for i, name in enumerate(alike):
            values = [row[3 + i] for row in of]
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name}: expected the same on all ranks of ep_group, got {values}"
                )
        bad = [r for r, row in enumerate(of) if row[2]]
        if bad:
            raise ValueError(
                f"topk_ids: expected ids 0 to {num_experts}, got others on ranks {bad} of ep_group"
            )

    def _start(self, sent: Tensor, splits: Splits) -> Pending:
        received = sent.new_empty((sum(splits.of), *sent.shape[1:]))
        work = dist.all_to_all_single(
            received, sent, splits.of, splits.to, group=self.group, async_op=True
        )
        return Pending(work, received, sent)

    # ---- to the experts ------------------------------------------------------------------------

    def send_rows(self, x: Tensor) -> Pending:
        """Start sending row t of x (T, W), W a multiple of 8 bytes, to the experts of token t.

        What arrives is (rows received, W / 8 bytes) int64.
        """
        return self._start(_words(x).index_select(0, self.token_of_row), self.rows)

    def send_side(self, *parts: Tensor) -> Pending:
        """Start sending parts (T, w) of 4 bytes an element, row by row, in one message of int32."""
        side = torch.cat([part.view(torch.int32) for part in parts], dim=1)
        return self._start(side.index_select(0, self.token_of_row), self.rows)

    def receive(self, ids: Tensor) -> None:
        """Set the permutation of the received tokens, from their expert ids (R, K) int32."""
        local = ids - self.group.rank() * self.num_local_experts
        elsewhere = (local < 0) | (local >= self.num_local_experts)
        local = local.masked_fill(elsewhere, self.num_local_experts)
        maps = Permutation.of(local, self.num_local_experts)
        # The slots that are here are known: no buffer need hold those that are not.
        capacity = padded_capacity(sum(self.slots.of), self.num_local_experts)
        self.permutation = maps._replace(slot_of_row=maps.slot_of_row[:capacity])
        if self.combine == "rows":
            row = maps.row_of_slot.flatten().long()
            count = sum(self.slots.of)
            place = torch.where(row < 0, count, (row >= 0).cumsum(0) - 1)
            self.returned_row = row.new_zeros(count + 1).scatter_(0, place, row)[:count]

    # ---- and back ------------------------------------------------------------------------------

    def return_rows(self, rows: Tensor) -> Returned:
        """Start sending permuted rows (Rcap, H) BF16 back; gives (T, H), each token's rows summed.

        The sum is FP32, in the order of k ("rows") or of the ranks' first k ("sums").
        """
        if self.combine == "rows":
            words = _words(rows).index_select(0, self.returned_row)
            pending = self._start(words, self.slots.back())
            index = self.position_of_slot
        else:
            sums = _sum_of_rows(rows, self.permutation.row_of_slot)
            pending = self._start(_words(sums), self.rows.back())
            index = self.first_row_of_slot
        return Returned(pending, index, _sum_of_words)

    def return_slots(self, values: Tensor) -> Returned:
        """Start sending values (R, K) float32 of the received slots back; gives (T, K)."""
        return Returned(self._start(values, self.rows.back()), self.row_of_slot, _value_of_slot)


class FP8Message(NamedTuple):
    """Per-token FP8 rows on their way: data, and scales with whatever else travels beside them."""

    data: Pending
    side: Pending

    @classmethod
    def start(cls, exchange: Exchange, x8: FP8Tensor, *more: Tensor) -> FP8Message:
        return cls(exchange.send_rows(x8.data), exchange.send_side(x8.scale, *more))

    def wait(self) -> tuple[FP8Tensor, Tensor]:
        """The rows as a per_token FP8Tensor, and the rest of the side message, (R, w) int32."""
        data, side = self.data.wait().view(FP8_DTYPE), self.side.wait()
        blocks = data.shape[1] // BLOCK
        return restore(data, side[:, :blocks].view(torch.float32)), side[:, blocks:]
