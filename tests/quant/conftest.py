"""A second implementation of the casts, in numpy: E4M3 by its definition and a table search."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch


def _e4m3_value(code: int) -> float:
    """The value of a code below 0x7F: 4 exponent bits with bias 7, 3 mantissa bits."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa / 8 * 2.0**-6
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


VALUES = np.array([_e4m3_value(code) for code in range(0x7F)])
MIDPOINTS = (VALUES[:-1] + VALUES[1:]) / 2


def e4m3_bytes(v: np.ndarray) -> np.ndarray:
    """The nearest code, ties to the even one; values beyond the largest take the largest."""
    magnitude = np.abs(v).astype(np.float64)
    code = np.searchsorted(MIDPOINTS, magnitude, side="left")
    tie = (code < len(MIDPOINTS)) & (MIDPOINTS[np.minimum(code, len(MIDPOINTS) - 1)] == magnitude)
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    return (code + 0x80 * np.signbit(v)).astype(np.uint8)


def block_scale(block: np.ndarray, pow2: bool) -> tuple[np.float32, np.float32]:
    """Scale and multiplier of one block of finite FP32 values."""
    amax = np.float32(max(np.abs(block).max(initial=0.0), 2.0**-48))
    scale = amax / np.float32(448)
    if not pow2:
        return scale, np.float32(448) / amax
    mantissa, exponent = math.frexp(scale)
    n = exponent - 1 if mantissa == 0.5 else exponent
    return np.float32(2.0**n), np.float32(2.0**-n)


def quantize(x: np.ndarray, rows: int, columns: int, pow2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of x (M, K), and scales for blocks of rows x columns."""
    m, k = x.shape
    data = np.zeros((m, k), np.uint8)
    scale = np.zeros((-(-m // rows), -(-k // columns)), np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            if np.isfinite(x[at]).all():
                scale[i, j], inv = block_scale(x[at], pow2)
                data[at] = e4m3_bytes(np.clip(x[at] * inv, np.float32(-448), np.float32(448)))
            else:
                scale[i, j], data[at] = np.nan, 0x7F
    return data, scale


Oracle = Callable[[torch.Tensor, int, int, bool], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def oracle() -> Oracle:
    """oracle(x, rows, columns, pow2) -> bytes of x (M, K), scales of blocks rows x columns."""

    def run(
        x: torch.Tensor, rows: int, columns: int, pow2: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        data, scale = quantize(x.float().cpu().numpy(), rows, columns, pow2)
        return torch.from_numpy(data), torch.from_numpy(scale)

    return run
