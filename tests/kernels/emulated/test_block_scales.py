"""Columns with one scale per 128 x 128 block: the kernels' source, run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fp8moe import testing
from fp8moe.kernels import cast, cast_permute, permute, reference

from .conftest import plant

Start = Callable[..., torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]

pow2s = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])


def assert_same(got: Pair, wanted: Pair, slot_of_row: torch.Tensor) -> None:
    """The same bits in the columns of the rows up to the last group's padded end."""
    used = int((slot_of_row != -2).sum())
    for name, a, b, end in zip(("data", "scale"), got, wanted, (used, used // 128), strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert testing.same_bits(a[:, :end], b[:, :end]), f"{name} differs"


def routed(tokens: int, topk: int) -> torch.Tensor:
    """slot_of_row of four experts, some slots dropped."""
    ids, _ = testing.random_topk(tokens, topk, 4, seed=1, dropped=0.1)
    return reference.route(ids, 4)[1]


@pytest.mark.parametrize("pow2_in", [True, False], ids=["from pow2", "from amax"])
@pow2s
@pytest.mark.parametrize("spread", [5, 40])
def test_fp8_rows(emulated: Start, pow2_in: bool, pow2: bool, spread: int) -> None:
    """Gaussian rows, zero rows, whole zero blocks, NaN and Inf; an odd number of column blocks."""
    slot_of_row = routed(90, 2)
    x = torch.randn(90, 384) * torch.randint(-spread, spread + 1, (90, 1)).exp2()
    x[3] = 0
    x[:, 128:256] = 0
    x[5, 7] = math.nan
    x[6, 383] = math.inf
    emulated(permute)
    args = (*reference.cast_per_token(x.bfloat16(), pow2_in), slot_of_row, 2, pow2, True)
    wanted = reference.permute_fp8_to_channel(*args)
    assert wanted[1].isnan().any() and not wanted[1].isnan().all()
    assert_same(permute._permute_fp8_to_channel_cuda(*args), wanted, slot_of_row)


@pytest.mark.parametrize(("topk", "hidden"), [(1, 128), (3, 1408)])
@pytest.mark.parametrize(("pow2", "spread"), [(True, 5), (True, 40), (False, 5)])
def test_high_precision_rows(
    emulated: Start, pow2: bool, spread: int, topk: int, hidden: int
) -> None:
    """In one pass, and cast first: the same bits."""
    slot_of_row = routed(50, topk)
    x = torch.randn(50, hidden) * torch.randint(-spread, spread + 1, (50, 1)).exp2()
    x[3] = 0
    x[5, 7] = math.nan
    x = x.bfloat16()
    emulated(cast_permute, permute)
    wanted = reference.cast_permute_to_channel(x, slot_of_row, topk, pow2, True)
    one_pass = cast_permute._channel_cuda(x, slot_of_row, topk, pow2, True)
    assert_same(one_pass, wanted, slot_of_row)
    x8 = reference.cast_per_token(x, pow2)
    two = permute._permute_fp8_to_channel_cuda(*x8, slot_of_row, topk, pow2, True)
    assert_same(two, wanted, slot_of_row)


def any_row_scales(base: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """128 rows of every E4M3 byte, 2**0 to 2**-63 below 2**base; some padding."""
    shift = torch.arange(128)[torch.randperm(128)] // 2
    shift[:2] = 0
    scale = torch.empty_strided((128, 2), (1, 128), dtype=torch.float32)
    scale.copy_(torch.exp2((base - shift).double()).float()[:, None])
    order = torch.stack([torch.randperm(256) for _ in range(128)])
    data = order.to(torch.uint8).view(torch.float8_e4m3fn)
    slot_of_row = torch.randperm(128).int()
    slot_of_row[torch.rand(128) < 0.1] = -1
    return data, scale, slot_of_row


@pow2s
@pytest.mark.parametrize("base", [-120, -60, -56, -55, -20, 0, 110, 117, 118, 119, 120, 121])
def test_blocks_of_any_row_scales(emulated: Start, base: int, pow2: bool) -> None:
    """Where a factor is no f16 any more, at the floor of the scales and where FP32 overflows."""
    emulated(permute)
    for factor in (1.0, 1.0 + 2.0**-23, 1.9):
        data, scale, slot_of_row = any_row_scales(base)
        scale[::3] *= factor
        scale[7:9] = 0.0
        args = (data, scale, slot_of_row, 1, pow2, True)
        wanted = reference.permute_fp8_to_channel(*args)
        assert_same(permute._permute_fp8_to_channel_cuda(*args), wanted, slot_of_row)


# -------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize(
    ("right", "wrong", "pow2"),
    [
        ("+ first / 2)[i]", "+ first / 2)[0]", True),
        ("+ first)[i]", "+ first)[0]", False),
        ("row_scale[2] * block.inv, row_scale[3]", "row_scale[3] * block.inv, row_scale[2]", True),
        ("mantissas == 0) &&", "true) &&", True),
        ("largest <= kMaxLargest;\n    rein", "true;\n    rein", True),
        ("amax = kInfBits - 1", "amax = kInfBits", True),
        ("s.scale = __uint_as_float(largest)", "(void)0", False),
        ("column / 128 * ld", "column / 256 * ld", True),
        ("? 0.0f : __ldg(scale +", "? 1024.0f : __ldg(scale +", True),
    ],
    ids=[
        "factors",
        "rows",
        "order",
        "mantissas",
        "overflow",
        "cap",
        "rounded scale",
        "column block",
        "padding",
    ],
)
def test_a_planted_error_in_the_block_form_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, pow2: bool
) -> None:
    plant(monkeypatch, right, wrong)
    emulated(permute)
    with pytest.raises(AssertionError, match="differ"):
        for base in (0, 120):
            for factor in (1.0, 1.0 + 2.0**-23):
                data, scale, slot_of_row = any_row_scales(base)
                slot_of_row[0] = -1
                scale *= factor
                args = (data, scale, slot_of_row, 1, pow2, True)
                wanted = reference.permute_fp8_to_channel(*args)
                assert_same(permute._permute_fp8_to_channel_cuda(*args), wanted, slot_of_row)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("m = max_u32(m, warp_amax[i])", "m = warp_amax[i]"),
        ("column0 / kBlock) * scale_ld", "column0 / 256) * scale_ld"),
        ("kBlockScales ? block_inv :", "kBlockScales ? 2.0f * block_inv :"),
    ],
    ids=["warps", "place", "inverse"],
)
def test_a_planted_error_in_the_cast_of_blocks_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    plant(monkeypatch, right, wrong)
    emulated(cast)
    x, ends = torch.randn(128, 264).bfloat16(), torch.tensor([128], dtype=torch.int32)
    x[9, 9] = 100.0
    with pytest.raises(AssertionError, match="differ"):
        got = cast._cast_per_channel_cuda(x, ends, True, True)
        assert_same(got, reference.cast_per_channel(x, ends, True, True), torch.zeros(128))
