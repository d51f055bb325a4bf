"""GEMMs, casts and permutations: ``torch.ops.fp8moe`` with Hopper kernels and a CPU reference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8moe.kernels.fp8tensor import FP8Tensor
    from fp8moe.kernels.gemm import (
        gemm_nt,
        k_grouped_gemm,
        m_grouped_gemm_nt,
        m_grouped_gemm_nt_masked,
    )

__all__ = [
    "FP8Tensor",
    "gemm_nt",
    "k_grouped_gemm",
    "m_grouped_gemm_nt",
    "m_grouped_gemm_nt_masked",
]


# On first use: the files of this package import each other, and the compiler and the cache are of
# use without any operator being registered.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "fp8tensor" if name == "FP8Tensor" else "gemm"
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
