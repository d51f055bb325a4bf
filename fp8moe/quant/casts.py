"""The three scale granularities: 1 x 128 (per_token), 128 x 128 (per_block), 128 x 1 (per_channel).

per_channel is transposed, for the sum over tokens in wgrad: dy^T with a scale for 128 tokens of one
channel, and x^T with one for 128 tokens x 128 channels (block=True). In every GEMM, then, the first
operand has 1 x 128 scales and the second 128 x 128 ones, which a GEMM multiplies in with half the
instructions of two 1 x 128 operands. Below about 2**-14 of its block's maximum a value loses bits.

All of them share one arithmetic. With amax the largest |x| of a block, at least 2**-48,

    scale = amax / 448, or with pow2 the smallest power of two not below that,
    data = e4m3(x / scale), rounded to nearest even, |data| <= 448.

A power of two costs 0.3 dB on Gaussian data; in return a per_token tensor becomes a per_channel one
without a second rounding (down to where E4M3 is subnormal). A block that holds a NaN or an Inf gets
scale NaN and data NaN, so whatever it is multiplied with shows it. An all-zero block gets zero data
and the smallest scale. The CUDA kernels and the CPU reference give the same bits.

A cast takes any K; a GEMM needs K to be a multiple of 16. Casts are not differentiable: what they
return is detached from the graph (`fp8moe.functional` holds the gradients).
"""

from __future__ import annotations

import torch

from fp8moe.kernels import cast
from fp8moe.kernels.fp8tensor import FP8_DTYPE, FP8Tensor


def check_fp8_tensor(name: str, t: object) -> None:
    """Raise ValueError unless `t` is a pair, such as an FP8Tensor."""
    if not isinstance(t, tuple) or len(t) != 2:
        raise ValueError(f"{name}: expected FP8Tensor(data, scale), got {type(t).__name__}")


def per_token(x: torch.Tensor, *, pow2: bool = True) -> FP8Tensor:
    """data[m, k] = e4m3(x[m, k] / scale[m, k // 128]).

    For activations and gradients that a GEMM multiplies along their rows.

    Args:
        x: (M, K) bfloat16, float16 or float32; M and K may be zero.
        pow2: round each scale up to a power of two.

    Returns:
        data (M, K) float8_e4m3fn, contiguous; scale (M, ceil(K/128)) float32, MN-major: strides
        (1, ceil(M/4)*4).

    Raises:
        ValueError: x has another dtype or number of dimensions.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    return FP8Tensor(*cast.cast_per_token(x.detach(), pow2))


def per_block(w: torch.Tensor, *, pow2: bool = True) -> FP8Tensor:
    """data[e, n, k] = e4m3(w[e, n, k] / scale[e, n // 128, k // 128]).

    For weights. The scale of a 128 x 128 block serves its transpose too: see `transpose_per_block`.

    Args:
        w: (N, K) or (E, N, K) bfloat16, float16 or float32; any size may be zero.
        pow2: round each scale up to a power of two.

    Returns:
        data of the shape of w, float8_e4m3fn; scale ([E,] ceil(N/128), ceil(K/128)) float32; both
        contiguous.

    Raises:
        ValueError: w has another dtype or number of dimensions.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    _check_matrices("w", w)
    w = w.detach()
    if w.ndim == 2:
        data, scale = cast.cast_per_block(w.unsqueeze(0), pow2)
        return FP8Tensor(data.squeeze(0), scale.squeeze(0))
    return FP8Tensor(*cast.cast_per_block(w, pow2))


def per_block_both(w: torch.Tensor, *, pow2: bool = True) -> tuple[FP8Tensor, FP8Tensor]:
    """(per_block(w), transpose_per_block(per_block(w))), reading w once.

    Args:
        w: (N, K) or (E, N, K) bfloat16, float16 or float32; any size may be zero.
        pow2: round each scale up to a power of two.

    Returns:
        The FP8Tensor of w ([E,] N, K) and of its transpose ([E,] K, N).

    Raises:
        ValueError: w has another dtype or number of dimensions.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    _check_matrices("w", w)
    w = w.detach()
    if w.ndim == 2:
        data, scale, data_t, scale_t = cast.cast_per_block_both(w.unsqueeze(0), pow2)
        straight = FP8Tensor(data.squeeze(0), scale.squeeze(0))
        return straight, FP8Tensor(data_t.squeeze(0), scale_t.squeeze(0))
    data, scale, data_t, scale_t = cast.cast_per_block_both(w, pow2)
    return FP8Tensor(data, scale), FP8Tensor(data_t, scale_t)


def transpose_per_block(w: FP8Tensor) -> FP8Tensor:
    """data_t[e, k, n] = data[e, n, k], scale_t[e, kb, nb] = scale[e, nb, kb]: bytes move, exact.

    Args:
        w: a per_block tensor, data (N, K) or (E, N, K), scale ([E,] ceil(N/128), ceil(K/128)).

    Returns:
        The per_block tensor of the transpose: data ([E,] K, N), contiguous.

    Raises:
        ValueError: w is not a pair; dtype, dimensions, scale shape or device do not match.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.
    """
    check_fp8_tensor("w", w)
    data, scale = w
    if data.dtype != FP8_DTYPE:
        raise ValueError(f"w.data: expected dtype {FP8_DTYPE}, got {data.dtype}")
    _check_matrices("w.data", data)
    if scale.ndim != data.ndim:
        raise ValueError(
            f"w.scale: expected {data.ndim} dimensions for data {tuple(data.shape)}, "
            f"got {tuple(scale.shape)}"
        )
    if data.ndim == 2:
        data_t, scale_t = cast.transpose_per_block(data.unsqueeze(0), scale.unsqueeze(0))
        return FP8Tensor(data_t.squeeze(0), scale_t.squeeze(0))
    return FP8Tensor(*cast.transpose_per_block(data, scale))


def per_channel(
    x: torch.Tensor, group_ends: torch.Tensor, *, pow2: bool = True, block: bool = False
) -> FP8Tensor:
    """data[n, start_g + i] = e4m3(x[row_g + i, n] / scale[n, (start_g + i) // 128]), transposed.

    For the operands of wgrad, whose sum runs over the rows. Group g holds rows
    [group_ends[g-1], group_ends[g]) of x, row_g being the first. In the result it starts at
    start_g, the sum of the earlier groups' sizes each rounded up to a multiple of 128, and is
    filled up with zeros to such a multiple. Rows past group_ends[-1] take no part.

    Args:
        x: (R, N) bfloat16, float16 or float32.
        group_ends: (E,) int32 on x's device, cumulative; a group may be empty.
        pow2: round each scale up to a power of two.
        block: one scale for 128 channels: scale[n // 128, (start_g + i) // 128] in the formula.

    Returns:
        data (N, C) float8_e4m3fn, contiguous, C = max(128, floor((R + 127 E) / 128) * 128);
        scale (N, C/128) float32, MN-major: strides (1, ceil(N/4)*4), or with `block`
        (ceil(N/128), C/128), contiguous: a per_block tensor. Columns past the last group's padded
        end are undefined, and so are their scales: no kernel reads them.

    Raises:
        ValueError: dtypes, dimensions or devices do not match; ends that decrease or exceed R (on a
            GPU these are found by the kernel and raised by a later call).

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2 (128 x 1 blocks).
    """
    return FP8Tensor(*cast.cast_per_channel(x.detach(), group_ends, pow2, block))


def _check_matrices(name: str, w: torch.Tensor) -> None:
    if w.ndim not in (2, 3):
        raise ValueError(f"{name}: expected shape (N, K) or (E, N, K), got {tuple(w.shape)}")
