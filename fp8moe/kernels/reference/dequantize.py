"""FP8 data and scales back to FP32."""

from __future__ import annotations

import torch

from fp8moe.kernels.fp8tensor import BLOCK, ceil_div
from fp8moe.kernels.reference.cast import pad_to_blocks


def to_float(data: torch.Tensor) -> torch.Tensor:
    """float(data): float8_e4m3fn to FP32, exact.

    On a CPU torch converts one value at a time, 10 times slower than the shift below: an E4M3 byte
    moved 7 bits up, its sign 8, is the FP16 number 2**-8 times as large, subnormals included. Only
    NaN is another number there, so a tensor that has one takes the slow way.
    """
    if torch.compiler.is_compiling() or data.device.type != "cpu" or data.numel() == 0:
        return data.float()
    bits = data.view(torch.int8)
    if bits.amax() == 0x7F or data.view(torch.uint8).amax() == 0xFF:
        return data.float()
    # The widening copies the sign into bits 7 to 15: after the shift bit 14 is a copy too many.
    half = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return half.float().mul_(2.0**8)


def dequantize_per_token(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x[..., m, k] = float(data[..., m, k]) * scale[..., m, k // 128], FP32, contiguous."""
    *lead, k = data.shape
    kb = ceil_div(k, BLOCK)
    x = pad_to_blocks(to_float(data), -1).view(*lead, kb, BLOCK)
    x *= scale.contiguous().unsqueeze(-1)
    return x.view(*lead, kb * BLOCK)[..., :k].contiguous()


def dequantize_per_block(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """w[..., n, k] = float(data[..., n, k]) * scale[..., n // 128, k // 128], FP32, contiguous."""
    *lead, n, k = data.shape
    nb, kb = ceil_div(n, BLOCK), ceil_div(k, BLOCK)
    w = pad_to_blocks(to_float(data), -2, -1).view(*lead, nb, BLOCK, kb, BLOCK)
    w *= scale[..., :, None, :, None]
    return w.view(*lead, nb * BLOCK, kb * BLOCK)[..., :n, :k].contiguous()
