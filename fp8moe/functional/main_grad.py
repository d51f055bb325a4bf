"""Weight gradients: returned to autograd, or added straight to a parameter's FP32 `main_grad`.

Megatron-style trainers keep one FP32 gradient per parameter and add every micro-batch to it. When
the parameter carries it as `main_grad`, the wgrad GEMM adds to it itself: no BF16 gradient is
written, read and added. Autograd then gets None, and `grad_added_to_main_grad = True` on the
parameter tells the trainer's hooks not to add anything.
"""

from __future__ import annotations

import torch

from fp8moe.functional import bf16
from fp8moe.functional.sharded import whole
from fp8moe.kernels.arguments import check_tensor
from fp8moe.kernels.fp8tensor import FP8Tensor
from fp8moe.kernels.gemm import k_grouped_gemm


def check_main_grad(name: str, w: torch.Tensor) -> None:
    """Raises: ValueError for a main_grad that the GEMM cannot add to.

    RuntimeError for any main_grad under torch.compile.
    """
    main_grad = getattr(whole(w), "main_grad", None)
    if main_grad is None or not w.requires_grad:
        return
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}.main_grad: accumulating into it is not supported under torch.compile; remove "
            "it, or keep the expert layer out of the compiled region (torch.compiler.disable)"
        )
    check_tensor(f"{name}.main_grad", main_grad, tuple(w.shape), (torch.float32,), w.device)


def owner(w: torch.Tensor) -> torch.Tensor | None:
    """The parameter that w is, or is part of, if it carries a main_grad.

    Backward looks main_grad up again: it may be another by then.
    """
    return whole(w) if getattr(whole(w), "main_grad", None) is not None else None


def _take(w: torch.Tensor) -> torch.Tensor:
    w.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return w.main_grad  # type: ignore[attr-defined]


def fp8_wgrad(
    dy_t: FP8Tensor,
    x_t: FP8Tensor,
    group_ends: torch.Tensor,
    w: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """dw[g] = sum over the rows of group g of dy^T x, both operands token-transposed FP8.

    Args:
        w: owner of a main_grad to add to, or None.
        dtype: of the returned gradient.

    Returns: (E, N, K), or None if it went to main_grad.
    """
    if w is not None:
        k_grouped_gemm(dy_t, x_t, group_ends, out=_take(w), accumulate=True)
        return None
    shape = (group_ends.shape[0], dy_t.data.shape[0], x_t.data.shape[0])
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    out = torch.empty(shape, dtype=stored, device=group_ends.device)
    return k_grouped_gemm(dy_t, x_t, group_ends, out=out).to(dtype)


def bf16_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    group_ends: torch.Tensor,
    w: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The same from BF16 operands (R, N) and (R, K); rounded to BF16 once before it is added."""
    dw = bf16.grouped_wgrad(dy, x, group_ends)
    if w is not None:
        _take(w).add_(dw)
        return None
    return dw.to(dtype)
