"""Rows written into the rows of a message: the bits of the operators that return them."""

from __future__ import annotations

import pytest
import torch

from fp8moe import testing
from fp8moe.kernels import cast_permute, message, permute, reference
from fp8moe.kernels.fp8tensor import FP8_DTYPE

H = 384
PITCH = H * 2 + 64
AROUND = 0x55


def maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    _, first_row, _, slot_of_row, _ = reference.dispatch_maps(
        torch.randint(0, 9, (70, 3)), 8, 4, []
    )
    return first_row.to(device), slot_of_row.to(device)


def message_rows(slot_of_row: torch.Tensor) -> torch.Tensor:
    shape = (len(slot_of_row), PITCH)
    return torch.full(shape, AROUND, dtype=torch.uint8, device=slot_of_row.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pow2", [True, False])
def test_cast_rows(device: torch.device, dtype: torch.dtype, pow2: bool) -> None:
    first_row, slot_of_row = maps(device)
    used = int((slot_of_row >= 0).sum())
    x = torch.randn(70, H).to(device, dtype)
    rows = message_rows(slot_of_row)
    data, scale = rows.view(FP8_DTYPE)[:, :H], rows.view(torch.float32)[:, H // 4 : H // 4 + 3]
    message.cast_permute_into(x, first_row, slot_of_row, pow2, data, scale)
    expected = cast_permute.cast_permute(x, first_row, slot_of_row, pow2)
    assert testing.same_bits(data[:used], expected[0][:used])
    assert testing.same_bits(scale[:used], expected[1][:used])
    assert (rows[:, H + 12 :] == AROUND).all()
    # Negative control: a row further on holds something else.
    assert not testing.same_bits(data[1:used], expected[0][: used - 1])


def test_bf16_rows(device: torch.device) -> None:
    first_row, slot_of_row = maps(device)
    used = int((slot_of_row >= 0).sum())
    x = torch.randn(70, H, device=device).bfloat16()
    rows = message_rows(slot_of_row)
    data = rows.view(torch.bfloat16)[:, :H]
    message.permute_rows_into(x, first_row, slot_of_row, data)
    assert torch.equal(data[:used], permute.permute_rows(x, first_row, slot_of_row)[:used])
    assert (rows[:, 2 * H :] == AROUND).all()
    # Negative control: a row further on holds something else.
    assert not torch.equal(data[1:used], data[: used - 1])


def test_bad_arguments_are_named() -> None:
    first_row, slot_of_row = maps(torch.device("cpu"))
    rows, x = message_rows(slot_of_row), torch.zeros(70, H).bfloat16()
    data, scale = rows.view(FP8_DTYPE)[:, :H], rows.view(torch.float32)[:, :3]
    for parts, error in (
        ((data[:, :256], scale[:, :2]), r"data: expected shape \(256, 384\), got \(256, 256\)"),
        ((data.view(torch.int8), scale), "data: expected torch.float8_e4m3fn"),
        ((data.t().contiguous().t(), scale), "data: expected a contiguous tensor"),
        ((data, scale[:, :2]), r"scale: expected \(256, 3\)"),
    ):
        with pytest.raises(ValueError, match=error):
            message.cast_permute_into(x, first_row, slot_of_row, True, *parts)
    with pytest.raises(ValueError, match="data: expected torch.bfloat16"):
        message.permute_rows_into(x, first_row, slot_of_row, data)
