"""What a layer keeps between forward and backward, and how much memory a step takes on top."""

from __future__ import annotations

from collections.abc import Callable

import torch


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of memory that the graph of `forward()` holds and that did not exist before.

    Two graphs are built and kept: what both hold (inputs, weights, cached copies of weights) is not
    the activations' memory. Whole allocations are counted, unused capacity included.
    """

    def storages() -> tuple[dict[int, int], list[object]]:
        found: dict[int, int] = {}
        keep: list[object] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            keep.append(storage)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            keep.append(forward())
        return found, keep

    first, keep_first = storages()
    second, keep_second = storages()
    del keep_first, keep_second
    return sum(size for pointer, size in second.items() if pointer not in first)


def peak_bytes(step: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Most memory allocated at any time of `step()`, less what was there before and its results."""
    step()  # caches
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    held = sum(t.untyped_storage().nbytes() for t in results)
    return torch.cuda.max_memory_allocated() - before - held
