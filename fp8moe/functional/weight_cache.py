"""Low-precision copies of weights: made once per version of a weight, shared by micro-batches.

A copy belongs to one tensor object, held weakly (for the local part of a sharded weight, the
weight), and is used again only while all of these are what they were when it was made:

    w._version      every in-place update through autograd's view of w raises it (optimizers,
                    copy_ under no_grad, load_state_dict),
    w.data_ptr()    `w.data = other` and resized storage change it,
    optimizer steps for a weight that requires grad: any torch.optim step anywhere makes it stale,
                    which covers optimizers that write through flat buffers or re-gather shards.

What none of them shows is a write through another tensor that shares w's memory, `w.data.copy_(v)`
for one, outside of an optimizer step: call `clear_weight_cache()` after it.

The cache is not used for tensor subclasses and inference tensors, under torch.compile, and while a
CUDA graph is being captured: a replay must cast the weights of its own time.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8moe.functional.sharded import whole
from fp8moe.kernels.cast import cast_per_block, cast_per_block_both, transpose_per_block
from fp8moe.kernels.fp8tensor import FP8Tensor


class WeightCacheInfo(NamedTuple):
    """What the weight cache did and holds.

    Args:
        hits: uses of a weight served by a copy that was already there.
        misses: uses that had to cast (or, for a missing transpose, to transpose).
        entries: weights with at least one copy.
        bytes: memory that the copies take.
    """

    hits: int
    misses: int
    entries: int
    bytes: int


class _Entry:
    """The copies of one weight, and what the weight was when they were made."""

    def __init__(self, w: torch.Tensor) -> None:
        self.ref = weakref.ref(whole(w), _forget(id(whole(w))))
        self.state = _state(w)
        self.fp8: dict[bool, tuple[FP8Tensor, FP8Tensor | None]] = {}
        self.bf16: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        pairs = [t for pair in self.fp8.values() for t in pair if t is not None]
        out = [x for t in pairs for x in t]
        return out if self.bf16 is None else [*out, self.bf16]


_entries: dict[int, _Entry] = {}
_hits = 0
_misses = 0
_optimizer_steps = 0
_hook: Any = None


def _forget(key: int) -> Any:
    def forget(ref: weakref.ref[torch.Tensor]) -> None:
        # The id may already belong to another tensor with an entry of its own.
        entry = _entries.get(key)
        if entry is not None and entry.ref is ref:
            del _entries[key]

    return forget


def _state(w: torch.Tensor) -> tuple[int, int, int, int]:
    # A frozen weight outlives optimizer steps: it is cast once in a fine-tuning run. The parameter
    # tells, because under no_grad a local part of it never requires grad.
    steps = _optimizer_steps if whole(w).requires_grad else -1
    return whole(w)._version, w._version, w.data_ptr(), steps


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


def _usable(w: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or type(w) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if w.is_inference() or w.is_meta:
        return False
    return not (w.is_cuda and torch.cuda.is_current_stream_capturing())


def _entry(w: torch.Tensor) -> _Entry:
    """The entry of w as it is now; a stale one is dropped before its successor is filled."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_count_step)
    key = id(whole(w))
    entry = _entries.get(key)
    if entry is None or entry.ref() is not whole(w) or entry.state != _state(w):
        entry = _entries[key] = _Entry(w)
    return entry


def _cast(w: torch.Tensor, pow2: bool, transposed: bool) -> tuple[FP8Tensor, FP8Tensor | None]:
    if not transposed:
        return FP8Tensor(*cast_per_block(w, pow2)), None
    data, scale, data_t, scale_t = cast_per_block_both(w, pow2)
    return FP8Tensor(data, scale), FP8Tensor(data_t, scale_t)


def fp8_weight(
    w: torch.Tensor, *, pow2: bool, transposed: bool, cache: bool
) -> tuple[FP8Tensor, FP8Tensor | None]:
    """(w, w^T) ~= data * scale with 128 x 128 scales; the transpose is exact.

    Args:
        w: (E, N, K) contiguous, BF16, FP16 or FP32.
        pow2: power-of-two scales.
        transposed: also the transpose, data (E, K, N).
        cache: look for the copies in the cache, and leave them there.

    Returns: per_block FP8Tensors of w and of its transpose (None if there is none and none was
        asked for).
    """
    global _hits, _misses
    if not (cache and _usable(w)):
        return _cast(w.detach(), pow2, transposed)
    entry = _entry(w)
    row, transpose = entry.fp8.get(pow2, (None, None))
    if row is not None and (transpose is not None or not transposed):
        _hits += 1
        return row, transpose
    _misses += 1
    # Copies made under inference_mode could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        if row is None:
            row, transpose = _cast(w, pow2, transposed)
        else:
            transpose = FP8Tensor(*transpose_per_block(row.data, row.scale))
    entry.fp8[pow2] = (row, transpose)
    return row, transpose


def hold(w: torch.Tensor, copy: FP8Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What forward saves of a weight for backward: its FP8 copy, or w itself to be cast again."""
    return (w, None) if copy is None else (copy.data, copy.scale)


def held(
    data: torch.Tensor, scale: torch.Tensor | None, *, pow2: bool, transposed: bool
) -> FP8Tensor:
    """The FP8 weight, or its transpose, of what `hold` returned."""
    if scale is not None:
        return FP8Tensor(data, scale)
    row, transpose = fp8_weight(data, pow2=pow2, transposed=transposed, cache=False)
    return row if transpose is None else transpose


def bf16_weight(w: torch.Tensor, *, cache: bool) -> torch.Tensor:
    """w in BF16: itself if it is BF16 already, else a copy that is cached like the FP8 ones."""
    global _hits, _misses
    if w.dtype == torch.bfloat16:
        return w.detach()
    if not (cache and _usable(w)):
        return w.detach().bfloat16()
    entry = _entry(w)
    if entry.bf16 is not None:
        _hits += 1
        return entry.bf16
    _misses += 1
    with torch.inference_mode(False), torch.no_grad():
        entry.bf16 = w.bfloat16()
    return entry.bf16


def clear_weight_cache() -> None:
    """Forget every copy: the next use of each weight casts it again.

    Needed after writing to a weight behind autograd's back (see the module's docstring), and useful
    to free the memory. Copies that a pending backward holds stay valid: they are the weights its
    forward used.
    """
    _entries.clear()


def weight_cache_info() -> WeightCacheInfo:
    """Hits and misses since the process started, and what the cache holds now."""
    copies = [t for entry in _entries.values() for t in entry.tensors()]
    size = sum(t.numel() * t.element_size() for t in copies)
    return WeightCacheInfo(_hits, _misses, len(_entries), size)
