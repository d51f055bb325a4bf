"""The all-to-all of one batch over the ranks of an expert-parallel group, and its way back.

Rank r of n holds the experts r * E/n to (r + 1) * E/n - 1. A token goes once to every rank that has
one of its experts, however many of them it has there. What arrives is ordered by source rank and,
within a rank, by token: the token order of the ranks' batches laid end to end. So an expert sees
the rows, and the order of rows, that it would see if all of those tokens were in one process.

A row of a message is a token's data and all that belongs to it: scales and, in forward, routing
weights and expert ids. The kernels that write a message and those that bring received rows into
expert order take rows that are apart, so nothing is packed or unpacked by itself.

The sizes of the messages differ from rank to rank and must be known on the host, which is the only
host synchronisation: `Exchange.plan` starts exchanging them, `Exchange.settle` waits for them. In
between the first message is packed, at the most that it can hold: when the host knows how much to
send, it only has to say so. The way back and the whole backward reuse the sizes.

Few operations: the host launches them while the device has little else to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from fp8moe.functional.unfused import Permutation
from fp8moe.kernels.dispatch import dispatch_maps, dispatch_routing
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, ceil_div, padded_capacity
from fp8moe.kernels.message import cast_permute_into, permute_rows_into
from fp8moe.kernels.permute import gather_slots, gather_sum, route_kept

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


class _Sizes:
    """What each rank tells each other about its message, and this rank's own; read on the host."""

    def __init__(self, both: Tensor, group: dist.ProcessGroup) -> None:
        self._both = both
        self._work = dist.all_to_all_single(both[1], both[0], group=group, async_op=True)

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


def _sum_of_rows(rows: Tensor, index: Tensor) -> Tensor:
    if rows.shape[0] == 0:  # every slot of the batch is dropped, or there is none
        return rows.new_zeros((index.shape[0], rows.shape[1]))
    return gather_sum(rows, index)


def _sum_of_words(words: Tensor, index: Tensor) -> Tensor:
    return _sum_of_rows(words.view(torch.bfloat16), index)


def _value_of_slot(values: Tensor, index: Tensor) -> Tensor:
    if values.shape[0] == 0:
        return values.new_zeros(index.shape)
    return gather_slots(values.view(1, -1), index)


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
    # Of the tokens that this rank owns, as `dispatch_maps` gives them.
    row_of_slot: Tensor
    first_row_of_slot: Tensor
    position_of_slot: Tensor  # where a slot comes back
    slot_of_row: Tensor
    # Of what this rank received: set by `receive`.
    permutation: Permutation
    row_of_received: Tensor  # (slots received,) int32, the permuted row of each, in their order

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
        alike = {
            "K": topk_ids.shape[1],
            "E": num_experts,
            "combine": _COMBINE.index(combine),
        } | alike
        self.alike = list(alike)
        *maps, sizes = dispatch_maps(topk_ids, num_experts, ranks, list(alike.values()))
        self.sizes = _Sizes(sizes, group)
        self.row_of_slot, self.first_row_of_slot, self.position_of_slot, self.slot_of_row = maps
        return self

    def settle(self) -> Exchange:
        """Wait on the host for the sizes of the messages.

        Raises: ValueError, on every rank alike, for an id out of range on any of them and for what
            must be the same and is not.
        """
        to, of = self.sizes.read()
        del self.sizes
        self._check(of, self.num_experts, self.alike)
        self.rows, self.slots = (Splits([r[i] for r in to], [r[i] for r in of]) for i in range(2))
        # Messages packed from here on need not hold more than there is.
        self.slot_of_row = self.slot_of_row[: padded_capacity(sum(self.rows.to), 1)]
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

    def send(self, packed: Tensor) -> Pending:
        """Start sending what was packed. What arrives has the same columns and one row per row."""
        return self._start(packed[: sum(self.rows.to)], self.rows)

    def receive(self, routing: Tensor) -> Tensor:
        """Set the permutation of the received tokens, from what `dispatch_routing` sent.

        Returns: their weights (R, K) float32.
        """
        weights, ids = routing.unflatten(1, (2, -1)).transpose(0, 1).contiguous()
        kept = sum(self.slots.of)
        *maps, self.row_of_received = route_kept(ids, self.num_local_experts, kept)
        self.permutation = Permutation(*maps)
        return weights.view(torch.float32)

    # ---- and back ------------------------------------------------------------------------------

    def return_rows(self, rows: Tensor) -> Returned:
        """Start sending permuted rows (Rcap, H) BF16 back; gives (T, H), each token's rows summed.

        The sum is FP32, in the order of k ("rows") or of the ranks' first k ("sums").
        """
        if self.combine == "rows":
            words = _words(rows).index_select(0, self.row_of_received)
            pending, index = self._start(words, self.slots.back()), self.position_of_slot
        else:
            sums = _sum_of_rows(rows, self.permutation.row_of_slot)
            pending, index = self._start(_words(sums), self.rows.back()), self.first_row_of_slot
        return Returned(pending, index, _sum_of_words)

    def return_slots(self, values: Tensor) -> Returned:
        """Start sending values (slots received,) float32 back; gives (T, K)."""
        return Returned(
            self._start(values, self.slots.back()), self.position_of_slot, _value_of_slot
        )


class Parts(NamedTuple):
    """Views of a message's rows.

    Args:
        data: (R, H) float8_e4m3fn or bfloat16.
        scale: (R, H/128) float32, per_token; None for bfloat16.
        routing: (R, 2K) int32, the token's weights, then its experts; None if they do not travel.
    """

    data: Tensor
    scale: Tensor | None
    routing: Tensor | None


class Layout(NamedTuple):
    """What a row of a message holds.

    Args:
        hidden: H.
        fp8: whether data is in FP8, else in BF16.
        topk: K of the routing weights and ids; 0: these do not travel.
    """

    hidden: int
    fp8: bool
    topk: int

    @property
    def words(self) -> tuple[int, int, int]:
        """Of 4 bytes: data, scales, routing."""
        data, scales = (4, ceil_div(self.hidden, BLOCK)) if self.fp8 else (2, 0)
        return self.hidden // data, scales, 2 * self.topk

    @property
    def row_bytes(self) -> int:
        """Kernels read and write 16 bytes at a time."""
        return ceil_div(4 * sum(self.words), 16) * 16

    def parts(self, rows: Tensor) -> Parts:
        """Of rows (R, row_bytes) uint8, contiguous."""
        data, scales, routing = self.words
        words = rows.view(torch.int32)
        return Parts(
            rows.view(FP8_DTYPE if self.fp8 else torch.bfloat16)[:, : self.hidden],
            words[:, data : data + scales].view(torch.float32) if self.fp8 else None,
            words[:, data + scales : data + scales + routing] if routing else None,
        )


class Message:
    """One row per token and rank: packed when made, sent by `start`, after `Exchange.settle`.

    Args:
        x: (T, H), cast once per token on its way into the message; BF16 if it is to stay so.
        pow2: whether scales are powers of two; None: x travels in BF16.
        topk_ids, topk_weights: what travels beside x; weights in FP32.
    """

    def __init__(
        self,
        exchange: Exchange,
        x: Tensor,
        pow2: bool | None,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> None:
        topk = 0 if topk_ids is None else topk_ids.shape[1]
        self._exchange, self._layout = exchange, Layout(x.shape[1], pow2 is not None, topk)
        first_row, slots = exchange.first_row_of_slot, exchange.slot_of_row
        size = (len(slots), self._layout.row_bytes)
        self._packed = torch.empty(size, dtype=torch.uint8, device=x.device)
        data, scale, routing = self._layout.parts(self._packed)
        if pow2 is None:
            permute_rows_into(x, first_row, slots, data)
        else:
            assert scale is not None
            cast_permute_into(x, first_row, slots, pow2, data, scale)
        if topk_ids is not None:
            assert topk_weights is not None and routing is not None
            local = exchange.num_local_experts
            dispatch_routing(topk_ids, topk_weights, first_row, local, routing)

    def start(self) -> Message:
        self._sent = self._exchange.send(_words(self._packed))
        del self._packed
        return self

    def wait(self) -> Parts:
        """What this rank gets."""
        received = self._sent.wait()
        del self._sent
        return self._layout.parts(received.view(torch.uint8))
