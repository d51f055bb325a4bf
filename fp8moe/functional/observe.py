"""A look at the FP8 tensors that the expert layers make, for logging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fp8moe.kernels.fp8tensor import FP8Tensor

Callback = Callable[[str, FP8Tensor], None]

# A plain tuple, not a context variable: the autograd engine runs backward in threads of its own.
_callbacks: tuple[Callback, ...] = ()


@contextmanager
def observe_fp8(callback: Callback) -> Iterator[None]:
    """Call `callback(kind, t)` for every FP8 operand that the expert layers make inside the block.

    Kinds: "x" and "dy" (the layer's input and output gradient, one row per token), "act" (the
    activation with the routing weight folded in), "dh" (the gradient of h), "h" (only with
    save="fp8"), and the weights "w13" and "w2", at every use, cached or not; "x", "w" and "dy" from
    `grouped_linear`. "act", "dh" and "h" come with one row per routed slot, without padding; a
    dropped slot shows row 0 instead. The token-transposed operands of wgrad hold the same values
    and are not shown.

    The callback runs in forward and, possibly in another thread, in backward. It must not change
    `t`; to keep the device running ahead it should not read values on the host either. Code under
    torch.compile is not observed. Outside of any such block observing costs nothing.

    Args:
        callback: called with the kind and a per_token or (weights) per_block FP8Tensor.
    """
    global _callbacks
    _callbacks = (*_callbacks, callback)
    try:
        yield
    finally:
        at = max(i for i, c in enumerate(_callbacks) if c is callback)
        _callbacks = _callbacks[:at] + _callbacks[at + 1 :]


def observed() -> bool:
    """Whether anybody looks: for a tensor that is made for `report` alone."""
    return bool(_callbacks) and not torch.compiler.is_compiling()


def report(kind: str, t: FP8Tensor, rows: torch.Tensor | None = None) -> None:
    """Show t to the observers, if there are any.

    Args:
        rows: int32 rows of t that hold data, any shape; None: all of them.
    """
    if not observed():
        return
    if rows is not None:
        index = rows.reshape(-1).clamp_min(0)
        data = t.data.view(torch.uint8).index_select(0, index).view(t.data.dtype)
        t = FP8Tensor(data, t.scale.index_select(0, index))
    for callback in _callbacks:
        callback(kind, t)
