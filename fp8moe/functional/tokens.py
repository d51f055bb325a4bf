"""Tokens on their way to the experts' GEMMs: FP8 rows and columns in expert order."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fp8moe.kernels.cast import cast_per_token
from fp8moe.kernels.cast_permute import cast_permute, cast_permute_both, cast_permute_to_channel
from fp8moe.kernels.fp8tensor import FP8Tensor
from fp8moe.kernels.permute import permute_fp8, permute_fp8_both, permute_fp8_to_channel

ONE_PASS_TOPK = 4
"""Slots per token up to which columns are made of high-precision tokens in one pass.

A token is then read once for each of its K rows, from L2, in twice the bytes of FP8. Measured on an
H100: in one pass 0.70 us for each million elements in expert order; in two 0.49 us, and 1.0 us for
each million in token order.
"""


class Tokens(NamedTuple):
    """(T, H) in token order: of high precision, cast while it is permuted, or in FP8 already.

    Args:
        data: BF16, FP16 or FP32, or float8_e4m3fn.
        scale: per_token with any strides, for data in FP8; else None.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None

    def fp8(self, pow2: bool) -> FP8Tensor:
        """The tokens in FP8, in token order."""
        if self.scale is None:
            return FP8Tensor(*cast_per_token(self.data, pow2))
        return FP8Tensor(self.data, self.scale)

    def rows(self, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, pow2: bool) -> FP8Tensor:
        """(Rcap, H) per_token, in expert order."""
        if self.scale is None:
            return FP8Tensor(*cast_permute(self.data, row_of_slot, slot_of_row, pow2))
        return FP8Tensor(*permute_fp8(self.data, self.scale, row_of_slot, slot_of_row))

    def columns(
        self, slot_of_row: torch.Tensor, topk: int, pow2: bool, *, block: bool
    ) -> FP8Tensor:
        """(H, Rcap) in expert order: per_channel, or with `block` one scale for 128 x 128."""
        if self.scale is None and topk <= ONE_PASS_TOPK:
            return FP8Tensor(*cast_permute_to_channel(self.data, slot_of_row, topk, pow2, block))
        return FP8Tensor(*permute_fp8_to_channel(*self.fp8(pow2), slot_of_row, topk, pow2, block))

    def both(self, slot_of_row: torch.Tensor, topk: int, pow2: bool) -> tuple[FP8Tensor, FP8Tensor]:
        """(rows, columns) from one read."""
        if self.scale is None:
            out = cast_permute_both(self.data, slot_of_row, topk, pow2)
        else:
            out = permute_fp8_both(self.data, self.scale, slot_of_row, topk, pow2)
        return FP8Tensor(*out[:2]), FP8Tensor(*out[2:])
