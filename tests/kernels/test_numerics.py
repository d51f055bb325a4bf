"""Where kernels reach the reference's bits by another way: their arithmetic, on the host."""

from __future__ import annotations

import pytest
import torch

from fp8moe.testing import same_bits


def test_power_of_two_scale_needs_no_division() -> None:
    """block_scale adds to the exponent where the reference divides and rounds up."""
    mantissas = torch.arange(0, 1 << 23, 61, dtype=torch.int32)
    near = torch.arange(0x600000 - 64, 0x600000 + 64, dtype=torch.int32)
    for exponent in (127 - 48, 120, 127, 135, 254):
        amax_bits = torch.cat([mantissas, near, near - 0x600000 + 64]) | (exponent << 23)
        amax = amax_bits.view(torch.float32)
        quotient = (amax / torch.full_like(amax, 448.0)).view(torch.int32)
        rounded_up = ((quotient - 1) >> 23) + 1
        assert torch.equal(rounded_up, ((amax_bits + 0x1FFFFF) >> 23) - 8)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c for FP32 tensors, rounded once."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    # FP64 halfway between two FP32 values although the sum is not: step towards the sum.
    raw = total.view(torch.int64)
    tie = ((raw & 0x1FFFFFFF) == 0x10000000) & (lost != 0)
    raw = raw + torch.where(tie, torch.where((lost > 0) == (total > 0), 1, -1), 0)
    return raw.view(torch.float64).float()


@pytest.mark.parametrize("error", [-1, 0, 1])
def test_newton_division_is_ieee_division(error: int) -> None:
    """divide_from is exact for an approximate reciprocal that is off by one unit either way."""
    m = (torch.arange(0, 1 << 23, 37, dtype=torch.int32) | 0x3F800000).view(torch.float32)

    def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        approximate = (torch.ones_like(b) / b).view(torch.int32) + error
        r = approximate.view(torch.float32)
        y = fma(r, fma(-b, r, torch.ones_like(b)), r)
        q = a * y
        q = fma(fma(-b, q, a), y, q)
        return fma(fma(-b, q, a), y, q)

    c = torch.full_like(m, 1.75)
    assert same_bits(divide(c, m), c / m)
    assert same_bits(divide(m, c), m / c)


@pytest.mark.parametrize("group", [8, 16], ids=["128 columns", "256 columns"])
def test_staged_tile_has_no_bank_conflicts(group: int) -> None:
    """byte_transpose.cuh: every byte has one place, and no access of a phase shares a bank."""

    def stage(j: int, c: int, g: int) -> int:
        return j * 128 + 8 * (g ^ c)

    def read(j: int, m: int) -> tuple[int, bool]:
        c = j // group
        return j * 128 + 16 * (m ^ (c >> 1)), bool(c & 1)

    written = {}
    for c in range(16):
        for k in range(group):
            for g in range(16):
                written[stage(group * c + k, c, g)] = (group * c + k, g)
    assert len(written) == 16 * group * 16
    for j in range(16 * group):
        for m in range(8):
            address, swapped = read(j, m)
            halves = [written[address], written[address + 8]]
            assert (halves[::-1] if swapped else halves) == [(j, 2 * m), (j, 2 * m + 1)]
    # 8-byte stores go by half-warps (16 values of c), 16-byte loads by eight lanes (one column).
    for k in range(group):
        for g in range(16):
            banks = {stage(group * c + k, c, g) % 128 // 8 for c in range(16)}
            assert len(banks) == 16
    for j in range(16 * group):
        assert len({read(j, m)[0] % 128 // 16 for m in range(8)}) == 8
