"""What autocast means here: it chooses the dtype of results, never that of our own arithmetic."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def _on(device: torch.device) -> bool:
    # Torch raises when asked about the meta device, on which models are traced and measured.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside: our FP32 arithmetic must stay FP32. Entered only where autocast is on."""
    return torch.autocast(device.type, enabled=False) if _on(device) else contextlib.nullcontext()


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """autocast's dtype where it is on, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if _on(x.device) else x.dtype
