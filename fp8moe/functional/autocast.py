"""What autocast means here: it chooses the dtype of results, never that of our own arithmetic."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside: our FP32 arithmetic must stay FP32. Entered only where autocast is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """autocast's dtype where it is on, else that of x."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
