"""FP8 training of mixture-of-experts models on Hopper GPUs.

Names are imported when they are first used, so that ``fp8moe --help`` and the like start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8moe import functional, kernels, modules, quant, testing
    from fp8moe.config import FP8Config
    from fp8moe.functional import (
        clear_weight_cache,
        grouped_linear,
        observe_fp8,
        swiglu_experts,
    )
    from fp8moe.kernels.fp8tensor import FP8Tensor
    from fp8moe.kernels.status import check_errors
    from fp8moe.modules import (
        Experts,
        FrozenExperts,
        MoE,
        Router,
        freeze_experts,
        merge_adapters,
        replace_experts,
        train_only_adapters,
    )

__version__ = "0.1.0"

__all__ = [
    "Experts",
    "FP8Config",
    "FP8Tensor",
    "FrozenExperts",
    "MoE",
    "Router",
    "check_errors",
    "clear_weight_cache",
    "freeze_experts",
    "functional",
    "grouped_linear",
    "kernels",
    "merge_adapters",
    "modules",
    "observe_fp8",
    "quant",
    "replace_experts",
    "swiglu_experts",
    "testing",
    "train_only_adapters",
]

_MODULE_OF = {
    "Experts": "fp8moe.modules",
    "FP8Config": "fp8moe.config",
    "FP8Tensor": "fp8moe.kernels.fp8tensor",
    "FrozenExperts": "fp8moe.modules",
    "MoE": "fp8moe.modules",
    "Router": "fp8moe.modules",
    "check_errors": "fp8moe.kernels.status",
    "clear_weight_cache": "fp8moe.functional",
    "freeze_experts": "fp8moe.modules",
    "grouped_linear": "fp8moe.functional",
    "merge_adapters": "fp8moe.modules",
    "observe_fp8": "fp8moe.functional",
    "replace_experts": "fp8moe.modules",
    "swiglu_experts": "fp8moe.functional",
    "train_only_adapters": "fp8moe.modules",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
