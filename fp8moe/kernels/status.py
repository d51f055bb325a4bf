"""Input errors found on the device, reported without a host synchronisation.

Each GPU has a buffer of eight int32 words in pinned host memory that kernels can write to. A kernel
that meets bad input (say ``group_ends`` that decrease) stays inside its buffers, writes index,
value and limit to words 1 to 3, calls ``__threadfence_system()``, then writes its code to word 0.
The host looks at the buffer before each operator, which is a plain memory read, and raises what it
finds. So the error arrives at the next operator or at ``check_errors``; with ``FP8MOE_DEBUG=1`` at
the operator itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
from enum import IntEnum

import torch

WORDS = 8


class Code(IntEnum):
    """What word 0 of the buffer says. The kernels use the same numbers."""

    OK = 0
    GROUP_ENDS_DECREASE = 1
    GROUP_ENDS_EXCEED_ROWS = 2
    EXPERT_ID_OUT_OF_RANGE = 3
    GROUP_SIZE_OUT_OF_RANGE = 4
    GROUP_END_UNALIGNED = 5


_MESSAGES: dict[int, str] = {
    Code.GROUP_ENDS_DECREASE: (
        "group_ends: expected a non-decreasing sequence, got group_ends[{index}] = {value} "
        "after {limit}"
    ),
    Code.GROUP_ENDS_EXCEED_ROWS: (
        "group_ends: expected at most {limit} (the number of rows), "
        "got group_ends[{index}] = {value}"
    ),
    Code.EXPERT_ID_OUT_OF_RANGE: (
        "topk_ids: expected 0 <= id <= {limit} (num_experts; num_experts itself drops the slot), "
        "got {value} at flat index {index}"
    ),
    Code.GROUP_SIZE_OUT_OF_RANGE: (
        "group_sizes: expected 0 <= size <= {limit} (the rows of a group), "
        "got group_sizes[{index}] = {value}"
    ),
    Code.GROUP_END_UNALIGNED: (
        "group_ends: expected multiples of {limit}, got group_ends[{index}] = {value}"
    ),
}


def message(code: int, index: int, value: int, limit: int) -> str:
    """The sentence for one error record, naming the argument, what was expected and what came."""
    template = _MESSAGES.get(code)
    if template is None:
        return (
            f"an fp8moe kernel reported the unknown status code {code} "
            f"(index {index}, value {value}, limit {limit})"
        )
    return template.format(index=index, value=value, limit=limit)


class _Buffer:
    """Eight int32 words that host and device both see."""

    def __init__(self, pin: bool) -> None:
        self.tensor = torch.zeros(WORDS, dtype=torch.int32, pin_memory=pin)
        self.pointer = ctypes.c_void_p(self.tensor.data_ptr())
        # A ctypes view costs tens of nanoseconds to read, tensor indexing microseconds.
        self.words = (ctypes.c_int32 * WORDS).from_address(self.tensor.data_ptr())

    def take(self) -> tuple[int, int, int, int] | None:
        """The error record, cleared; None when there is none."""
        code = self.words[0]
        if code == Code.OK:
            return None
        record = (code, self.words[1], self.words[2], self.words[3])
        for i in range(WORDS):
            self.words[i] = 0
        return record


_buffers: dict[int, _Buffer] = {}


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


@functools.cache
def debug() -> bool:
    """Whether ``FP8MOE_DEBUG=1`` asks for a synchronisation and a check after each operator.

    Read once, as ``registry.requested_backend``.
    """
    return os.environ.get("FP8MOE_DEBUG", "0") not in ("", "0")


def pointer(device: torch.device) -> ctypes.c_void_p:
    """The address of the status buffer of ``device``, to pass to a kernel as ``int* status``."""
    index = _index(device)
    buffer = _buffers.get(index)
    if buffer is None:
        # Under unified addressing the host address of pinned memory is its device address.
        buffer = _buffers[index] = _Buffer(pin=True)
    return buffer.pointer


def check(device: torch.device, *, op: str | None = None) -> None:
    """Raise the error that a kernel on ``device`` has reported, if any; does not synchronise.

    Raises: ValueError naming the argument, what was expected and the value found.
    """
    if not _buffers:
        return
    index = _index(device)
    buffer = _buffers.get(index)
    if buffer is None:
        return
    record = buffer.take()
    if record is not None:
        origin = f"fp8moe::{op}" if op else "an earlier fp8moe operator"
        raise ValueError(f"{message(*record)} (found on cuda:{index} by {origin})")


def check_errors() -> None:
    """Synchronise every GPU that fp8moe has used and raise the first input error found there.

    Raises: ValueError naming the argument, what was expected and the value found.
    """
    for index in list(_buffers):
        torch.cuda.synchronize(index)
        check(torch.device("cuda", index))
