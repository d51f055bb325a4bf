"""GEMMs, casts and permutations: ``torch.ops.fp8moe`` with Hopper kernels and a CPU reference."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "FP8Tensor": "fp8tensor",
    "gemm_nt": "gemm",
    "m_grouped_gemm_nt": "gemm",
    "m_grouped_gemm_nt_masked": "gemm",
    "k_grouped_gemm": "gemm",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
