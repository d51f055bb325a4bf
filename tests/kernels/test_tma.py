"""TMA descriptors: what is encoded, and what is refused before it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8moe.kernels import driver, tma

GOOD_MAP = dict(
    tensor_or_ptr=0x1000,
    dtype="u8",
    rows=5,
    cols=256,
    row_stride_bytes=256,
    box_rows=64,
    box_cols=128,
    swizzle=128,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tensor_or_ptr": 0x1008},
            "tensor_or_ptr: expected a 16-byte aligned address, got 0x1008",
        ),
        ({"tensor_or_ptr": 0}, "tensor_or_ptr"),
        ({"dtype": "f16"}, "dtype: expected one of u8, bf16, f32, got 'f16'"),
        ({"rows": 0}, "rows: expected 1 to .*, got 0"),
        ({"cols": 0}, "cols: expected 1 to .*, got 0"),
        ({"row_stride_bytes": 264}, "row_stride_bytes: .* got 264"),
        ({"row_stride_bytes": 128}, "row_stride_bytes: .* from 256 .* got 128"),
        ({"box_rows": 257}, "box_rows: expected 1 to 256, got 257"),
        ({"box_cols": 0}, "box_cols: expected 1 to 256, got 0"),
        (
            {"row_order": ((8, 2), (2, 1))},
            "rows: expected a multiple of the 16 rows of row_order, got 5",
        ),
        (
            {"rows": 32, "box_rows": 8, "row_order": ((8, 2), (2, 1))},
            "box_rows: expected a multiple of the 16 rows .*, got 8",
        ),
        ({"swizzle": 64}, "swizzle: expected 0 or 128, got 64"),
        ({"box_cols": 24}, "box_cols: .* multiple of 16 bytes .*got 24 u8 = 24 bytes"),
        ({"box_cols": 144}, "box_cols: .* up to 128, got 144"),
        (
            {"dtype": "bf16", "row_stride_bytes": 512, "box_cols": 128},
            "box_cols: .* got 128 bf16 = 256 bytes",
        ),
    ],
)
def test_what_tma_cannot_do_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tma.tensor_map(**{**GOOD_MAP, **change})


def test_descriptor_is_encoded_once_per_argument_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver as real

    calls: list[tuple] = []

    contexts: list[str] = []
    results = [real.CUresult.CUDA_ERROR_INVALID_CONTEXT]  # of the first call

    def encode_tiled(*args: Any) -> tuple:
        if results:
            return results.pop(), None
        calls.append(args)
        return real.CUresult.CUDA_SUCCESS, real.CUtensorMap()

    names = (
        "CUtensorMapDataType",
        "CUtensorMapSwizzle",
        "CUtensorMapInterleave",
        "CUtensorMapL2promotion",
        "CUtensorMapFloatOOBfill",
        "cuuint64_t",
        "cuuint32_t",
        "CUresult",
    )
    fake = SimpleNamespace(
        cuTensorMapEncodeTiled=encode_tiled,
        cuDeviceGet=lambda index: (real.CUresult.CUDA_SUCCESS, index),
        cuDevicePrimaryCtxRetain=lambda device: (real.CUresult.CUDA_SUCCESS, f"context {device}"),
        cuCtxSetCurrent=lambda context: (
            contexts.append(context),
            (real.CUresult.CUDA_SUCCESS,),
        )[1],
        **{name: getattr(real, name) for name in names},
    )
    for module in (tma, driver):
        monkeypatch.setattr(module, "driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tma._tensor_map.cache_clear()
    first = tma.tensor_map(**GOOD_MAP)
    assert len(first.data) == 128 and tma.tensor_map(**GOOD_MAP) is first
    tma.tensor_map(**{**GOOD_MAP, "rows": 6})
    tma.tensor_map(**{**GOOD_MAP, "rows": 160, "row_order": ((8, 2), (2, 1))})
    tma._tensor_map.cache_clear()
    assert len(calls) == 3 and contexts == ["context 0"]
    dtype, rank, pointer, dims, strides, box, elements, _, swizzle, _, _ = calls[0]
    assert (dtype.name, rank, pointer) == ("CU_TENSOR_MAP_DATA_TYPE_UINT8", 2, 0x1000)
    assert [int(d) for d in dims] == [256, 5] and [int(s) for s in strides] == [256]
    assert [int(b) for b in box] == [128, 64] and [int(e) for e in elements] == [1, 1]
    assert swizzle.name == "CU_TENSOR_MAP_SWIZZLE_128B"
    _, rank, _, dims, strides, box, elements, *_ = calls[2]
    assert rank == 4 and [int(d) for d in dims] == [256, 8, 2, 10]
    assert [int(s) for s in strides] == [512, 256, 4096]
    assert [int(b) for b in box] == [128, 8, 2, 4] and [int(e) for e in elements] == [1] * 4
