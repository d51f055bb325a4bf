"""The all-to-all of one batch over the ranks of an expert-parallel group, and its way back.

Rank r of n holds the experts r * E/n to (r + 1) * E/n - 1. A token goes once to every rank that has
one of its experts, however many of them it has there. What arrives is ordered by source rank and,
within a rank, by token: the token order of the ranks' batches laid end to end. So an expert sees
the rows, and the order of rows, that it would see if all of those tokens were in one process.

What travels in FP8 is two messages: the data, which the receiver uses where it arrives, and beside
it the scales (in forward with the routing weights and expert ids). In one message every row would
have to be copied out of its packet before a kernel could read it.

The sizes of the messages differ from rank to rank and must be known on the host, which is the only
host synchronisation: `Exchange.plan` starts exchanging them, `Exchange.settle` waits for them. In
between the messages are packed, at the most that they can hold: when the host knows how much to
send, it only has to say so. The way back and the whole backward reuse the sizes.

Few and small operations: the host launches them while the device has little else to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from fp8moe.functional.saved import restore
from fp8moe.functional.unfused import Permutation
from fp8moe.kernels.cast_permute import cast_permute
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, FP8Tensor, ceil_div, padded_capacity
from fp8moe.kernels.permute import gather_sum, permute_rows

Tensor = torch.Tensor

Combine = Literal["rows", "sums"]
"""What comes back. "sums": one row per token and rank, summed there in FP32 and rounded to BF16;
fewer bytes and copies. "rows": every expert's output row, to be summed by the token's owner in the
order of k, bit for bit as in one process."""

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


_SLOTS = (1 << 32) - 1
"""Rows and slots are counted in one int64, rows in its upper half: one scan does for both."""


class _Counts(NamedTuple):
    """A batch's rows and slots when they are grouped by rank, in slot order within a rank.

    Args:
        rank: (T, K) int64, the slot's rank; the number of ranks if it is dropped.
        before: (ranks + 1, T) int64, what comes before a token's, packed.
        of_rank: (ranks,) int64, how many go to each rank, packed.
    """

    rank: Tensor
    before: Tensor
    of_rank: Tensor

    @classmethod
    def of(cls, rank: Tensor, ranks: int) -> _Counts:
        rank_KT = rank.t()
        # One line per rank, the last for dropped slots: it comes after all others and shifts none.
        slots = torch.zeros((ranks + 1, len(rank)), dtype=torch.int64, device=rank.device)
        slots.scatter_add_(0, rank_KT, slots.new_ones(1).expand(rank_KT.shape))
        packed = slots.add(slots.clamp(max=1), alpha=1 << 32)
        before = packed.flatten().cumsum(0).view_as(packed) - packed
        return cls(rank, before, packed[:ranks].sum(dim=1))


class _Maps(NamedTuple):
    """Where a batch's slots are in the messages.

    Args:
        row: (T, K) int32, the message row of the slot's token to the slot's rank, -1 if dropped.
        first_row: the same, but -1 where an earlier slot of the token has that row.
        position: (T, K) int32, the slot's place among all slots, -1 if dropped; None unless wanted.
        slot: (capacity,) int32, the slot that a message row is the first of, -2 past the last one;
            with first_row a routing map as `route` makes them, but without padding.
    """

    row: Tensor
    first_row: Tensor
    position: Tensor | None
    slot: Tensor

    @classmethod
    def of(cls, counts: _Counts, wants_position: bool) -> _Maps:
        rank, ranks = counts.rank, len(counts.of_rank)
        before = counts.before.t().gather(1, rank)
        slots, rows = before.view(torch.int32).unflatten(1, (-1, 2)).unbind(2)  # little-endian
        same = rank.unsqueeze(2) == rank.unsqueeze(1)
        earlier = same.tril(-1).sum(dim=2, dtype=torch.int32)
        dropped = rank == ranks
        row = rows.masked_fill(dropped, -1)
        first_row = row.masked_fill(earlier > 0, -1)
        position = None
        if wants_position:
            position = (slots + earlier).masked_fill_(dropped, -1).contiguous()
        # A slot that starts no row of its own writes to the last place, which is cut off.
        tokens, topk = rank.shape
        capacity = max(BLOCK, ceil_div(tokens * min(topk, ranks), BLOCK) * BLOCK)
        place = torch.where(first_row < 0, capacity, first_row).long()
        every = torch.arange(tokens * topk, dtype=torch.int32, device=rank.device)
        slot = torch.full((capacity + 1,), -2, dtype=torch.int32, device=rank.device)
        slot.scatter_(0, place.flatten(), every)
        return cls(row.contiguous(), first_row.contiguous(), position, slot[:capacity])


class _Sizes:
    """What each rank tells each other about its message, and this rank's own; read on the host."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        self._both = torch.stack([sent, sent])
        self._work = dist.all_to_all_single(self._both[1], sent, group=group, async_op=True)
        self._sent = sent

    def read(self) -> tuple[list[list[int]], list[list[int]]]:
        """(sent, received). On a stream of its own: what was launched since need not be done."""
        device = self._both.device
        with torch.cuda.stream(_reading_stream(device)) if self._both.is_cuda else nullcontext():
            self._work.wait()
            to, of = self._both.tolist()
        return to, of


@functools.cache
def _reading_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _on_device(device: torch.device, values: tuple[int, ...], lines: int) -> Tensor:
    """(lines, values) int64. Made once: a copy from the host would wait for the device."""
    return torch.tensor([values] * lines, device=device)


@functools.cache
def _local_ids(device: torch.device, num_experts: int, here: range) -> Tensor:
    """(num_experts + 1,) int32: an expert's number on this rank, len(here) if it is elsewhere."""
    local = [e - here.start if e in here else len(here) for e in range(num_experts + 1)]
    return torch.tensor(local, dtype=torch.int32, device=device)


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
        rows: Splits of the messages to the experts, one row per token and rank; from `settle` on.
        slots: Splits in units of (token, expert) pairs; from `settle` on.
        combine: see `Combine`.
    """

    group: dist.ProcessGroup
    combine: Combine
    num_experts: int
    num_local_experts: int
    rows: Splits
    slots: Splits
    sizes: _Sizes  # until `settle`
    alike: list[str]
    # Of the tokens that this rank owns.
    row_of_slot: Tensor  # (T, K) int32, the sent row that serves a slot, -1 if dropped
    first_row_of_slot: Tensor  # the same, but -1 where an earlier slot of the token has that row
    position_of_slot: Tensor | None  # (T, K) int32, where a slot comes back with combine="rows"
    slot_of_row: Tensor  # (at least rows sent,) int32, the first slot that a sent row serves
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
        """Which token goes where; starts exchanging the sizes, which `settle` reads.

        Args:
            topk_ids: (T, K) int32 or int64, 0 to num_experts, which drops the slot. T may differ
                from rank to rank and be zero, K may not.
            alike: what else must be the same on all ranks, by name.
        """
        self, ranks = cls(), group.size()
        self.group, self.combine, self.num_experts = group, combine, num_experts
        self.num_local_experts = num_experts // ranks
        tokens, topk = topk_ids.shape

        ids = topk_ids.long()
        right = ids.clamp(0, num_experts)
        counts = _Counts.of(right // self.num_local_experts, ranks)
        alike = {"K": topk, "E": num_experts, "combine": _COMBINE.index(combine), **alike}
        self.alike = list(alike)
        own = torch.stack([counts.of_rank, (right != ids).sum().expand(ranks)], dim=1)
        constants = _on_device(ids.device, tuple(alike.values()), ranks)
        self.sizes = _Sizes(torch.cat([own, constants], dim=1), group)

        maps = _Maps.of(counts, wants_position=combine == "rows")
        self.row_of_slot, self.first_row_of_slot = maps.row, maps.first_row
        self.position_of_slot, self.slot_of_row = maps.position, maps.slot
        return self

    def settle(self) -> Exchange:
        """Wait on the host for the sizes of the messages.

        Raises: ValueError, on every rank alike, for an id out of range on any of them and for what
            must be the same and is not.
        """
        to, of = self.sizes.read()
        del self.sizes
        self._check(of, self.num_experts, self.alike)
        self.rows = Splits([r[0] >> 32 for r in to], [r[0] >> 32 for r in of])
        self.slots = Splits([r[0] & _SLOTS for r in to], [r[0] & _SLOTS for r in of])
        # Messages packed from here on need not hold more than there is.
        self.slot_of_row = self.slot_of_row[: padded_capacity(sum(self.rows.to), 1)]
        return self

    @staticmethod
    def _check(of: list[list[int]], num_experts: int, alike: list[str]) -> None:
        for i, name in enumerate(alike):
            values = [row[2 + i] for row in of]
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name}: expected the same on all ranks of ep_group, got {values}"
                )
        bad = [r for r, row in enumerate(of) if row[1]]
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
    # What is packed has rows in the order of the message, and undefined ones past the last.

    def pack_fp8(self, x: Tensor, pow2: bool) -> FP8Tensor:
        """x (T, H) of high precision, cast once per token on its way into the message."""
        return FP8Tensor(*cast_permute(x, self.first_row_of_slot, self.slot_of_row, pow2))

    def pack_bf16(self, x: Tensor) -> Tensor:
        return permute_rows(x, self.first_row_of_slot, self.slot_of_row)

    def pack_side(self, *parts: Tensor) -> Tensor:
        """parts (T, w) of 4 bytes an element, side by side in int32."""
        side = torch.cat([part.view(torch.int32) for part in parts], dim=1)
        if len(side) == 0:
            return side.new_empty((len(self.slot_of_row), side.shape[1]))
        topk = self.row_of_slot.shape[1]
        return side.index_select(0, self.slot_of_row.clamp_min(0) // topk)

    def send(self, packed: Tensor) -> Pending:
        """Start sending what was packed. What arrives has the same columns and one row per row."""
        return self._start(packed[: sum(self.rows.to)], self.rows)

    def receive(self, ids: Tensor) -> None:
        """Set the permutation of the received tokens, from their expert ids (R, K) int32."""
        first = self.group.rank() * self.num_local_experts
        here = range(first, first + self.num_local_experts)
        table = _local_ids(ids.device, self.num_experts, here)
        local = table.index_select(0, ids.flatten()).view(ids.shape)
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
            assert self.position_of_slot is not None
            index = self.position_of_slot
        else:
            sums = _sum_of_rows(rows, self.permutation.row_of_slot)
            pending = self._start(_words(sums), self.rows.back())
            index = self.first_row_of_slot
        return Returned(pending, index, _sum_of_words)

    def return_slots(self, values: Tensor) -> Returned:
        """Start sending values (R, K) float32 of the received slots back; gives (T, K)."""
        return Returned(self._start(values, self.rows.back()), self.row_of_slot, _value_of_slot)


class FP8Message:
    """Per-token FP8 rows: packed when made, sent by `start`, which needs a settled exchange.

    Args:
        x: (T, H) of high precision.
        more: (T, w) of 4 bytes an element, which travel beside the scales.
    """

    def __init__(self, exchange: Exchange, x: Tensor, pow2: bool, *more: Tensor) -> None:
        self._exchange = exchange
        self._data, scale = exchange.pack_fp8(x, pow2)
        self._side = scale.view(torch.int32)
        if more:
            self._side = torch.cat([self._side, exchange.pack_side(*more)], dim=1)

    def start(self) -> FP8Message:
        exchange = self._exchange
        self._sent = exchange.send(_words(self._data)), exchange.send(self._side.contiguous())
        del self._data, self._side
        return self

    def wait(self) -> tuple[FP8Tensor, Tensor]:
        """The rows as a per_token FP8Tensor, and the rest of the side message, (R, w) int32."""
        data, side = (pending.wait() for pending in self._sent)
        del self._sent
        blocks = data.shape[1] // (BLOCK // data.element_size())
        scale = side[:, :blocks].view(torch.float32)
        return restore(data.view(FP8_DTYPE), scale), side[:, blocks:]
