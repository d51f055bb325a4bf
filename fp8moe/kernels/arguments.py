"""Argument checks: errors name what was expected and what came. The GEMMs' are in operands.py."""

from __future__ import annotations

import torch

from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, ceil_div


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Raise unless `tensor` is contiguous and has this shape, dtype and device.

    Args:
        shape: the size of each dimension, or the name of one that may have any.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    got = tensor.shape
    fits = len(got) == len(shape)
    if fits:
        for wanted, size in zip(shape, got, strict=True):
            if not isinstance(wanted, str) and wanted != size:
                fits = False
    if not fits:
        expected = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(got)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {tuple(tensor.stride())} "
            f"for shape {tuple(got)}"
        )


def check_rows(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor` is a matrix of contiguous rows, a multiple of 16 bytes apart.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    apart = (
        tensor.dim() == 2
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.element_size() % 16 == 0
    )
    check_tensor(name, tensor, ("rows", "columns"), dtypes, contiguous=not apart)


def check_scales(name: str, scale: torch.Tensor, data: torch.Tensor) -> None:
    """Raise unless `scale` is a per_token scale for `data`, with any strides.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    rows, columns = data.shape
    blocks = ceil_div(columns, BLOCK)
    if tuple(scale.shape) != (rows, blocks):
        raise ValueError(
            f"{name}: expected ({rows}, {blocks}) for data ({rows}, {columns}), "
            f"got {tuple(scale.shape)}"
        )
    if scale.dtype != torch.float32:
        raise ValueError(f"{name}: expected torch.float32, got {scale.dtype}")
    if scale.device != data.device:
        raise ValueError(f"{name}: expected a tensor on {data.device}, got {scale.device}")


def check_fp8_rows(data: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise ValueError unless these are FP8 rows of whole blocks with per_token scales."""
    check_rows("data", data, (FP8_DTYPE,))
    check_multiple("data: H", data.shape[1], BLOCK)
    check_scales("scale", scale, data)


def check_scale(name: str, scale: torch.Tensor, data: torch.Tensor) -> None:
    """Raise unless `scale` is an MN-major per_token scale for `data`.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    check_scales(name, scale, data)
    rows, blocks = scale.shape
    unit = rows <= 1 or scale.stride(0) == 1
    if not unit or (blocks > 1 and scale.stride(1) < rows):
        raise ValueError(
            f"{name}: expected an MN-major scale with strides (1, >= {rows}), "
            f"got strides {tuple(scale.stride())}"
        )


def check_slot_of_row(slot_of_row: torch.Tensor, device: torch.device) -> None:
    """Raise unless `slot_of_row` is a routing map of whole 128-row blocks.

    Raises: ValueError naming what was expected and what came.
    """
    check_tensor("slot_of_row", slot_of_row, ("Rcap",), (torch.int32,), device)
    if slot_of_row.shape[0] % BLOCK:
        raise ValueError(
            f"slot_of_row: expected a multiple of {BLOCK} rows (see route), "
            f"got {slot_of_row.shape[0]}"
        )


def check_maps(x: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor) -> None:
    """Raise ValueError unless both are routing maps of the tokens `x`."""
    check_tensor("row_of_slot", row_of_slot, (x.shape[0], "K"), (torch.int32,), x.device)
    check_slot_of_row(slot_of_row, x.device)


def check_topk(topk: int) -> None:
    """Raise ValueError unless a token has at least one slot."""
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")


def check_multiple(name: str, value: int, unit: int) -> None:
    """Raise ValueError unless `value` is a multiple of `unit`."""
    if value % unit:
        raise ValueError(f"{name}: expected a multiple of {unit}, got {value}")


def check_aligned(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless every tensor starts at a 16-byte address (kernels load 16 bytes)."""
    for name, tensor in tensors.items():
        address = tensor.data_ptr()
        if address % 16:
            raise ValueError(f"{name}: expected a 16-byte aligned address, got {address:#x}")
