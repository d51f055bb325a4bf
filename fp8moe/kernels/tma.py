"""Descriptors of the tensor memory accelerator."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from fp8moe.kernels.driver import checked, driver, lacked_context

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGN = 64


@dataclass(frozen=True)
class TensorMap:
    """The 128 bytes of a TMA descriptor; a kernel takes it as a ``__grid_constant__`` parameter."""

    data: bytes


_ITEM_BYTES = {"u8": 1, "bf16": 2, "f32": 4}


def tensor_map(
    tensor_or_ptr: torch.Tensor | int,
    *,
    dtype: Literal["u8", "f32", "bf16"],
    rows: int,
    cols: int,
    row_stride_bytes: int,
    box_rows: int,
    box_cols: int,
    swizzle: Literal[0, 128],
    row_order: tuple[tuple[int, int], ...] = (),
) -> TensorMap:
    """The TMA descriptor of a rows x cols matrix read or written in box_rows x box_cols tiles.

    Elements out of bounds are read as zero and not written. Descriptors are cached by all
    arguments: they hold an address, not a tensor, so a reused address is the same descriptor.

    Args:
        tensor_or_ptr: the matrix, or the device address of its first element; 16-byte aligned.
        dtype: element type; FP8 data is ``u8``.
        rows, cols: extent in elements, at least 1; columns are contiguous.
        row_stride_bytes: bytes from one row to the next, a multiple of 16.
        box_rows, box_cols: tile, 1 to 256 each; a tile row is a multiple of 16 bytes, and at most
            128 bytes when swizzled.
        swizzle: 0, or 128 for the 128-byte swizzle that wgmma reads.
        row_order: how the rows of a group follow each other in shared memory, up to three axes of
            (extent, stride in rows), the fastest first: ((8, 2), (2, 1)) takes the even rows of 16,
            then the odd ones. The coordinate of rows then counts groups.

    Raises: ValueError naming the argument that TMA does not allow; DriverError without a driver.

    Source: PTX ISA, "Tensor Size, Strides and Box"; CUDA driver API, cuTensorMapEncodeTiled.
    """
    pointer = tensor_or_ptr if isinstance(tensor_or_ptr, int) else tensor_or_ptr.data_ptr()
    return _tensor_map(
        pointer, dtype, rows, cols, row_stride_bytes, box_rows, box_cols, swizzle, row_order
    )


@functools.lru_cache(maxsize=8192)
def _tensor_map(
    pointer: int,
    dtype: str,
    rows: int,
    cols: int,
    row_stride_bytes: int,
    box_rows: int,
    box_cols: int,
    swizzle: int,
    row_order: tuple[tuple[int, int], ...],
) -> TensorMap:
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"dtype: expected one of {', '.join(_ITEM_BYTES)}, got {dtype!r}")
    if pointer == 0 or pointer % 16:
        raise ValueError(f"tensor_or_ptr: expected a 16-byte aligned address, got {pointer:#x}")
    for name, extent in (("rows", rows), ("cols", cols)):
        if not 1 <= extent <= 2**32:
            raise ValueError(f"{name}: expected 1 to 2**32, got {extent}")
    item = _ITEM_BYTES[dtype]
    if row_stride_bytes % 16 or not cols * item <= row_stride_bytes < 2**40:
        raise ValueError(
            f"row_stride_bytes: expected a multiple of 16 from {cols * item} (a row of {cols} "
            f"{dtype}) to 2**40, got {row_stride_bytes}"
        )
    for name, extent in (("box_rows", box_rows), ("box_cols", box_cols)):
        if not 1 <= extent <= 256:
            raise ValueError(f"{name}: expected 1 to 256, got {extent}")
    if swizzle not in (0, 128):
        raise ValueError(f"swizzle: expected 0 or 128, got {swizzle}")
    box_bytes = box_cols * item
    if box_bytes % 16 or (swizzle and box_bytes > swizzle):
        limit = f" up to {swizzle}" if swizzle else ""
        raise ValueError(
            f"box_cols: expected a multiple of 16 bytes{limit}, got {box_cols} {dtype} "
            f"= {box_bytes} bytes"
        )
    extents = [extent for extent, _ in row_order]
    group = math.prod(extents)
    for name, extent in (("rows", rows), ("box_rows", box_rows)):
        if extent % group:
            raise ValueError(
                f"{name}: expected a multiple of the {group} rows of row_order, got {extent}"
            )

    cu = driver()
    types = {
        "u8": cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        "bf16": cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "f32": cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }
    swizzles = {
        0: cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        128: cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
    }

    def encode() -> tuple:
        return cu.cuTensorMapEncodeTiled(
            types[dtype],
            2 + len(row_order),
            pointer,
            [cu.cuuint64_t(n) for n in (cols, *extents, rows // group)],
            [cu.cuuint64_t(n * row_stride_bytes) for n in (*(s for _, s in row_order), group)],
            [cu.cuuint32_t(n) for n in (box_cols, *extents, box_rows // group)],
            [cu.cuuint32_t(1)] * (2 + len(row_order)),
            cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles[swizzle],
            cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )

    result = encode()
    if lacked_context(result[0], torch.cuda.current_device()):
        result = encode()
    (encoded,) = checked(result, "cuTensorMapEncodeTiled")
    return TensorMap(ctypes.string_at(encoded.getPtr(), TENSOR_MAP_BYTES))
