"""The plain PyTorch backend: every op of the package on any device, with bit-exact FP8 casts.

Same names and positional signatures as the ops. It reads `group_ends` on the host and loops over
the groups; the CUDA kernels do not.
"""

from fp8moe.kernels.reference.cast import (
    cast_per_block,
    cast_per_block_both,
    cast_per_channel,
    cast_per_token,
    transpose_per_block,
)
from fp8moe.kernels.reference.dequantize import dequantize_per_block, dequantize_per_token
from fp8moe.kernels.reference.dispatch import dispatch_maps, dispatch_routing
from fp8moe.kernels.reference.gemm import (
    gemm_nt,
    k_grouped_gemm,
    m_grouped_gemm_nt,
    m_grouped_gemm_nt_masked,
    m_grouped_gemm_swiglu,
    m_grouped_gemm_swiglu_backward,
)
from fp8moe.kernels.reference.permute import (
    cast_permute,
    cast_permute_both,
    cast_permute_into,
    cast_permute_to_channel,
    gather_slots,
    gather_sum,
    permute_fp8,
    permute_fp8_both,
    permute_fp8_to_channel,
    permute_rows,
    permute_rows_into,
    route,
    route_kept,
)
from fp8moe.kernels.reference.swiglu import (
    swiglu_backward_cast,
    swiglu_backward_rows,
    swiglu_cast,
    swiglu_cast_both,
    swiglu_rows,
)

__all__ = [
    "cast_per_block",
    "cast_per_block_both",
    "cast_per_channel",
    "cast_per_token",
    "cast_permute",
    "cast_permute_both",
    "cast_permute_into",
    "cast_permute_to_channel",
    "dequantize_per_block",
    "dequantize_per_token",
    "dispatch_maps",
    "dispatch_routing",
    "gather_slots",
    "gather_sum",
    "gemm_nt",
    "k_grouped_gemm",
    "m_grouped_gemm_nt",
    "m_grouped_gemm_nt_masked",
    "m_grouped_gemm_swiglu",
    "m_grouped_gemm_swiglu_backward",
    "permute_fp8",
    "permute_fp8_both",
    "permute_fp8_to_channel",
    "permute_rows",
    "permute_rows_into",
    "route",
    "route_kept",
    "swiglu_backward_cast",
    "swiglu_backward_rows",
    "swiglu_cast",
    "swiglu_cast_both",
    "swiglu_rows",
    "transpose_per_block",
]
