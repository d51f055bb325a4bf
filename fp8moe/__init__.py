"""FP8 training of mixture-of-experts models on Hopper GPUs."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "FP8Tensor": "kernels.fp8tensor",
    "FP8Config": "config",
    "grouped_linear": "functional",
    "swiglu_experts": "functional",
    "clear_weight_cache": "functional",
    "observe_fp8": "functional",
    "Router": "modules.router",
    "Experts": "modules.experts",
    "MoE": "modules.moe",
    "replace_experts": "modules.convert",
    "check_errors": "kernels.status",
}
_MODULES = ("config", "functional", "kernels", "modules", "quant", "testing")

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
