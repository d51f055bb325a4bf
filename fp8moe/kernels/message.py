"""Rows of a message between ranks, written where they travel: permutations into given memory.

A row of a message holds a token's data, its scales and more; `data` and `scale` are then parts of
rows that are further apart than they are wide.
"""

from __future__ import annotations

import torch

from fp8moe.kernels import cast_permute, permute, reference, registry
from fp8moe.kernels.arguments import (
    check_maps,
    check_multiple,
    check_rows,
    check_scales,
    check_tensor,
)
from fp8moe.kernels.fp8tensor import FP8_DTYPE


def _cast_fake(
    x: torch.Tensor,
    row_of_slot: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    data: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    pass


def _rows_cuda(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, data: torch.Tensor
) -> None:
    permute.launch_permute(x, data, None, None, row_of_slot, slot_of_row)


def _rows_fake(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, data: torch.Tensor
) -> None:
    pass


_cast_permute_into = registry.define_op(
    "cast_permute_into(Tensor x, Tensor row_of_slot, Tensor slot_of_row, bool pow2,"
    " Tensor(a!) data, Tensor(b!) scale) -> ()",
    cpu=reference.cast_permute_into,
    cuda=cast_permute.launch_rows,
    fake=_cast_fake,
)
_permute_rows_into = registry.define_op(
    "permute_rows_into(Tensor x, Tensor row_of_slot, Tensor slot_of_row, Tensor(a!) data) -> ()",
    cpu=reference.permute_rows_into,
    cuda=_rows_cuda,
    fake=_rows_fake,
)


def _check_data(
    data: torch.Tensor, dtype: torch.dtype, slot_of_row: torch.Tensor, x: torch.Tensor
) -> None:
    check_rows("data", data, (dtype,))
    expected = (slot_of_row.shape[0], x.shape[1])
    if tuple(data.shape) != expected:
        raise ValueError(f"data: expected shape {expected}, got {tuple(data.shape)}")


def cast_permute_into(
    x: torch.Tensor,
    row_of_slot: torch.Tensor,
    slot_of_row: torch.Tensor,
    pow2: bool,
    data: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """`cast_permute` that writes to data and scale; padding rows are undefined afterwards, too.

    Args:
        x, row_of_slot, slot_of_row, pow2: as for `cast_permute`.
        data: (Rcap, H) float8_e4m3fn, rows contiguous.
        scale: (Rcap, H/128) float32, with any strides.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    cast_permute.check(x, slot_of_row)
    check_tensor("row_of_slot", row_of_slot, (x.shape[0], "K"), (torch.int32,), x.device)
    _check_data(data, FP8_DTYPE, slot_of_row, x)
    check_scales("scale", scale, data)
    _cast_permute_into(x, row_of_slot, slot_of_row, pow2, data, scale)


def permute_rows_into(
    x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, data: torch.Tensor
) -> None:
    """`permute_rows` that writes to data.

    Args:
        x, row_of_slot, slot_of_row: as for `permute_rows`.
        data: (Rcap, H) bfloat16, rows contiguous.

    Raises: ValueError: wrong shape, dtype, device or stride.
    """
    check_rows("x", x, (torch.bfloat16,))
    check_multiple("x: H", x.shape[1], 8)
    check_maps(x, row_of_slot, slot_of_row)
    _check_data(data, torch.bfloat16, slot_of_row, x)
    _permute_rows_into(x, row_of_slot, slot_of_row, data)
