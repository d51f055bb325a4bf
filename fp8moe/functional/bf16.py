"""The grouped GEMMs in BF16: the twin of the FP8 ones, and what a GEMM switched to BF16 runs.

On the GPU they are torch's own grouped GEMM, on the CPU a loop over the groups in FP32 whose result
is rounded to BF16 once. As registered operators they are opaque to torch.compile, which cannot see
through a loop whose bounds are data.
"""

from __future__ import annotations

import torch

from fp8moe.kernels.reference import groups
from fp8moe.kernels.registry import define_op


def _linear_cpu(x: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    out = _linear_fake(x, w, group_ends)
    for g, (lo, hi) in enumerate(groups.bounds(group_ends, x.shape[0])):
        if hi > lo:
            out[lo:hi] = x[lo:hi].float() @ w[g].float().t()
    return out


def _linear_cuda(x: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=group_ends)


def _linear_fake(x: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


def _dgrad_cpu(dy: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    out = _dgrad_fake(dy, w, group_ends)
    for g, (lo, hi) in enumerate(groups.bounds(group_ends, dy.shape[0])):
        if hi > lo:
            out[lo:hi] = dy[lo:hi].float() @ w[g].float()
    return out


def _dgrad_cuda(dy: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(dy, w, offs=group_ends)


def _dgrad_fake(dy: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    return dy.new_empty((dy.shape[0], w.shape[2]))


def _wgrad_cpu(dy: torch.Tensor, x: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    out = _wgrad_fake(dy, x, group_ends)
    for g, (lo, hi) in enumerate(groups.bounds(group_ends, dy.shape[0])):
        out[g] = dy[lo:hi].float().t() @ x[lo:hi].float()
    return out


def _wgrad_cuda(dy: torch.Tensor, x: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(dy.t(), x, offs=group_ends)


def _wgrad_fake(dy: torch.Tensor, x: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    return dy.new_empty((group_ends.shape[0], dy.shape[1], x.shape[1]))


_linear = define_op(
    "bf16_grouped_linear(Tensor x, Tensor w, Tensor group_ends) -> Tensor",
    cpu=_linear_cpu,
    cuda=_linear_cuda,
    fake=_linear_fake,
)
_dgrad = define_op(
    "bf16_grouped_dgrad(Tensor dy, Tensor w, Tensor group_ends) -> Tensor",
    cpu=_dgrad_cpu,
    cuda=_dgrad_cuda,
    fake=_dgrad_fake,
)
_wgrad = define_op(
    "bf16_grouped_wgrad(Tensor dy, Tensor x, Tensor group_ends) -> Tensor",
    cpu=_wgrad_cpu,
    cuda=_wgrad_cuda,
    fake=_wgrad_fake,
)


def grouped_linear(x: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """y[r, n] = sum_k x[r, k] w[g, n, k], g the group of row r; rows past the last end undefined.

    Args:
        x: (R, K) BF16, contiguous.
        w: (E, N, K) BF16, contiguous. N and K multiples of 8 on the GPU.
        group_ends: (E,) int32 on the same device, cumulative.

    Returns: (R, N) BF16.
    """
    return _linear(x, w, group_ends)


def grouped_dgrad(dy: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """dx[r, k] = sum_n dy[r, n] w[g, n, k]; arguments as in `grouped_linear`. Returns (R, K)."""
    return _dgrad(dy, w, group_ends)


def grouped_wgrad(dy: torch.Tensor, x: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """dw[g, n, k] = sum over the rows r of group g of dy[r, n] x[r, k]; zeros for an empty group.

    Returns: (E, N, K) BF16.
    """
    return _wgrad(dy, x, group_ends)
