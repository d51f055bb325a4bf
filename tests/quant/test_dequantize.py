"""dequantize, quantization quality, and conversions between the granularities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8moe import quant
from fp8moe.kernels import reference
from fp8moe.testing import exact, poison, sqnr_db


@pytest.mark.parametrize("pow2", [False, True])
def test_is_the_product_rounded_once(device: Any, pow2: bool) -> None:
    x = torch.randn(2, 200, 300, device=device)
    ends = torch.tensor([37, 200], dtype=torch.int32, device=device)
    channel = quant.per_channel(x[0], ends, pow2=pow2)
    used = quant.FP8Tensor(channel.data[:, :384], channel.scale[:, :3])
    for t in (
        quant.per_token(x[0], pow2=pow2),
        quant.per_block(x[0], pow2=pow2),
        quant.per_block(x, pow2=pow2),
        used,
    ):
        out = quant.dequantize(t)
        assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == t.data.shape
        assert torch.equal(out, exact(t).float())


def test_batched_per_token(device: Any) -> None:
    x = torch.randn(3, 5, 300, device=device)
    parts = [quant.per_token(group) for group in x]
    t = quant.FP8Tensor(
        torch.stack([p.data.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn),
        torch.stack([p.scale for p in parts]),
    )
    assert torch.equal(quant.dequantize(t), torch.stack([quant.dequantize(p) for p in parts]))


def test_every_code_and_nan(device: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256)
    data = codes.view(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 2.0**120]], device=device)
    out = quant.dequantize(quant.FP8Tensor(data, scale)).cpu()
    expected = data.cpu().double() * scale.cpu().double().repeat_interleave(128, 1)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().sum() == 2
    assert torch.equal(out[:, :127], expected[:, :127].float())
    for column in (127, 255):
        one = quant.FP8Tensor(data[:, column : column + 1], scale[:, :1])
        assert quant.dequantize(one).isnan().all()


def test_subnormals_do_not_depend_on_the_flush_mode() -> None:
    data = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    t = quant.FP8Tensor(data, torch.full((1, 1), 2.0**-57))
    expected = quant.dequantize(t)
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(quant.dequantize(t), expected)
    finally:
        torch.set_flush_denormal(False)
    assert (expected[0, 1:] > 0).all()


@pytest.mark.parametrize("pow2", [False, True])
def test_quality_on_gaussian_data(device: Any, pow2: bool) -> None:
    x = torch.randn(512, 1024, device=device)
    ends = torch.tensor([256, 512], dtype=torch.int32, device=device)
    columns = quant.per_channel(x, ends, pow2=pow2, block=True)
    columns = quant.FP8Tensor(columns.data[:, :512], columns.scale[:, :4])
    assert sqnr_db(quant.dequantize(columns).t(), x) > 31
    for t in (quant.per_token(x, pow2=pow2), quant.per_block(x, pow2=pow2)):
        out = quant.dequantize(t)
        assert sqnr_db(out, x) > 31
        # Negative control: a scale off by one bit of the exponent, in one row of blocks.
        wrong = t.scale.clone()
        wrong[0] *= 2
        out = quant.dequantize(quant.FP8Tensor(t.data, wrong))
        assert sqnr_db(out, x) < 31


def test_row_scales_become_column_scales_without_a_second_rounding(device: Any) -> None:
    # Magnitudes within a factor of 2**7 stay normal E4M3 numbers under both scales.
    x = (torch.rand(256, 200, device=device) * 127 + 1) * torch.randn(
        256, 200, device=device
    ).sign()
    ends = torch.tensor([256], dtype=torch.int32, device=device)
    row = quant.per_token(x, pow2=True)
    column = quant.per_channel(quant.dequantize(row), ends, pow2=True)
    direct = quant.per_channel(x, ends, pow2=True)
    assert torch.equal(quant.dequantize(column), quant.dequantize(direct))
    assert torch.equal(quant.dequantize(column)[:, :256], quant.dequantize(row).t())

    # Negative control: with FP32 scales the second cast does round.
    row = quant.per_token(x, pow2=False)
    column = quant.per_channel(quant.dequantize(row), ends, pow2=False)
    assert not torch.equal(quant.dequantize(column)[:, :256], quant.dequantize(row).t())
    once, twice = quant.dequantize(row), quant.dequantize(column)[:, :256].t()
    assert sqnr_db(twice, x) < sqnr_db(once, x) - 0.5


def test_per_channel_sums_ignore_the_undefined_columns() -> None:
    x = torch.randn(100, 16)
    ends = torch.tensor([40, 100], dtype=torch.int32)
    a, b = quant.per_channel(x, ends), quant.per_channel(x, ends, block=True)
    out = torch.empty(2, 16, 16)
    reference.k_grouped_gemm(*a, *b, ends, out, False)
    for t in (a, b):
        poison(t.data[:, 256:])
        poison(t.scale[:, 2:])
    again = torch.empty(2, 16, 16)
    reference.k_grouped_gemm(*a, *b, ends, again, False)
    assert torch.equal(out, again)


def test_compiles_whole() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        return quant.dequantize(quant.per_token(x, pow2=True))

    x = torch.randn(5, 200)
    assert torch.equal(round_trip(x), quant.dequantize(quant.per_token(x, pow2=True)))


def test_errors_name_what_they_got() -> None:
    t = quant.per_token(torch.randn(300, 256))
    for bad, message in (
        (quant.FP8Tensor(t.data.float(), t.scale), r"t.data: expected dtype torch.float8_e4m3fn"),
        (quant.FP8Tensor(t.data, t.scale.double()), r"t.scale: expected dtype torch.float32"),
        (quant.FP8Tensor(t.data, t.scale.to("meta")), r"t.scale: expected device cpu, got meta"),
        (t.data, r"t: expected FP8Tensor\(data, scale\), got Tensor"),
        (quant.FP8Tensor(t.data[0], t.scale), r"t.data: expected 2 or 3 dimensions, got \(256,\)"),
        (
            quant.FP8Tensor(t.data, t.scale[:, :1]),
            r"t.scale: expected \(300, 2\) .* or \(3, 2\) .* for data \(300, 256\), got \(300, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            quant.dequantize(bad)
