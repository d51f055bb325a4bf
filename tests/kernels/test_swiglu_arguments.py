"""Bad arguments of SwiGLU with its casts are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8moe.kernels import swiglu
from fp8moe.kernels.fp8tensor import FP8_DTYPE

SLOTS = torch.full((128,), -2, dtype=torch.int32)
H = torch.zeros((128, 256), dtype=torch.bfloat16)
DA = torch.zeros((128, 128), dtype=torch.bfloat16)
P = torch.zeros((4, 2))

BAD_CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "h dtype": (swiglu.swiglu_cast, (H.float(), P, SLOTS, True), "h: expected torch.bfloat16"),
    "h rows": (swiglu.swiglu_cast, (H[:64], P, SLOTS, True), r"h: expected shape \(128, 256\)"),
    "h odd": (swiglu.swiglu_cast, (H[:, :255], P, SLOTS, True), "h: expected shape"),
    "h width": (
        swiglu.swiglu_cast,
        (H[:, :64].contiguous(), P, SLOTS, True),
        "h: I: expected a multiple of 128, got 32",
    ),
    "h stride": (swiglu.swiglu_cast, (H.t().contiguous().t(), P, SLOTS, True), "h: expected a con"),
    "weights dtype": (
        swiglu.swiglu_cast,
        (H, P.bfloat16(), SLOTS, True),
        "topk_weights: expected torch.float32, got torch.bfloat16",
    ),
    "map dtype": (swiglu.swiglu_cast, (H, P, SLOTS.long(), True), "slot_of_row: expected torch.in"),
    "da dtype": (
        swiglu.swiglu_backward_cast,
        (H, None, DA.half(), P, SLOTS, True),
        "da: expected torch.",
    ),
    "da width": (
        swiglu.swiglu_backward_cast,
        (H, None, DA[:, :64].contiguous(), P, SLOTS, True),
        r"h: expected shape \(128, 128\), got \(128, 256\)",
    ),
    "h is not FP8": (
        swiglu.swiglu_backward_cast,
        (H, torch.ones(128, 2), DA, P, SLOTS, True),
        "h: expected torch.float8_e4m3fn, got torch.bfloat16",
    ),
    "h has no scale": (
        swiglu.swiglu_backward_cast,
        (H.to(FP8_DTYPE), None, DA, P, SLOTS, True),
        "h: expected torch.bfloat16, got torch.float8_e4m3fn",
    ),
    "h scale": (
        swiglu.swiglu_backward_cast,
        (H.to(FP8_DTYPE), torch.ones(128, 1), DA, P, SLOTS, True),
        r"h_scale: expected \(128, 2\) for data \(128, 256\), got \(128, 1\)",
    ),
    "h scale stride": (
        swiglu.swiglu_backward_cast,
        (H.to(FP8_DTYPE), torch.ones(128, 2), DA, P, SLOTS, True),
        "h_scale: expected an MN-major scale",
    ),
    "da rows": (
        swiglu.swiglu_backward_cast,
        (H, None, DA[:64], P, SLOTS, True),
        r"da: expected shape \(128, 128\), got \(64, 128\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case: str) -> None:
    call, args, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(*args)
