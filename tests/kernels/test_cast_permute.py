"""Cast and permutation in one pass: the bits of the two steps, on both devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8moe import testing
from fp8moe.kernels import cast_permute, permute, reference

Tensors = tuple[torch.Tensor, ...]

# (T, K, E, H): one token, several warps a row, empty experts, many experts.
SHAPES = [(1, 1, 1, 128), (40, 2, 3, 1408), (150, 2, 4, 384), (100, 8, 40, 256), (9, 35, 40, 128)]
KINDS = ("gaussian", "masked", "spread", "quiet columns", "non-finite")


class Case:
    """x and the maps of one shape; `real` marks rows with a slot among the used ones."""

    def __init__(
        self, shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        tokens, self.topk, experts, hidden = shape
        ids = torch.randint(0, experts + 1, (tokens, self.topk))
        self.row_of_slot, self.slot_of_row, _, _ = reference.route(ids, experts)
        self.used = int((self.slot_of_row != -2).sum())
        self.real = self.slot_of_row[: self.used] >= 0
        x = torch.randn(tokens, hidden)
        if kind == "masked":
            x[::3] = 0
        elif kind == "spread":
            x *= torch.exp2(torch.randint(-30, 31, (tokens, 1)).float())
        elif kind == "quiet columns":
            x *= torch.exp2(torch.randint(-25, 1, (1, hidden)).float())
        elif kind == "non-finite":
            x[0, 3] = float("nan")
            x[tokens // 2, hidden // 2] = float("-inf")
            x[:, ::5] = 0
        self.x = x.to(dtype)

    def run(self, device: torch.device, pow2: bool) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        """Rows alone, columns alone, both, columns with block scales."""
        x, rows, slots = (t.to(device) for t in (self.x, self.row_of_slot, self.slot_of_row))
        return (
            cast_permute.cast_permute(x, rows, slots, pow2),
            cast_permute.cast_permute_to_channel(x, slots, self.topk, pow2, False),
            cast_permute.cast_permute_both(x, slots, self.topk, pow2),
            cast_permute.cast_permute_to_channel(x, slots, self.topk, pow2, True),
        )

    def two_steps(self, pow2: bool) -> Tensors:
        """Rows and columns, then columns with block scales."""
        x8 = reference.cast_per_token(self.x, pow2)
        return (
            *reference.permute_fp8_both(*x8, self.slot_of_row, self.topk, pow2),
            *reference.permute_fp8_to_channel(*x8, self.slot_of_row, self.topk, pow2, True),
        )


def assert_equal(
    case: Case, got: tuple[Tensors, Tensors, Tensors, Tensors], wanted: Tensors
) -> None:
    (rows, channels, both, blocks), used, real = got, case.used, case.real
    for name, a, b in zip(("data", "scale"), rows, wanted[:2], strict=True):
        assert testing.same_bits(a.cpu()[:used][real], b[:used][real]), f"rows: {name}"
    for name, a, b in zip(("data", "scale"), both[:2], wanted[:2], strict=True):
        assert testing.same_bits(a[:used], b[:used]), f"both: {name}"
    for out in (channels, both[2:]):
        assert testing.same_bits(out[0][:, :used], wanted[2][:, :used]), "data_t"
        assert testing.same_bits(out[1][:, : used // 128], wanted[3][:, : used // 128]), "scale_t"
    assert testing.same_bits(blocks[0][:, :used], wanted[4][:, :used]), "blocks: data_t"
    assert testing.same_bits(blocks[1][:, : used // 128], wanted[5][:, : used // 128]), "blocks"


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
@pytest.mark.parametrize(("shape", "kind"), [(s, k) for s in SHAPES for k in KINDS], ids=str)
def test_same_bits_as_two_steps(
    device: torch.device, shape: tuple[int, ...], kind: str, pow2: bool
) -> None:
    case = Case(shape, kind)
    assert_equal(case, case.run(device, pow2), case.two_steps(pow2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    case = Case((60, 2, 3, 256), "gaussian", dtype)
    assert_equal(case, case.run(device, True), case.two_steps(True))


@pytest.mark.gpu
def test_many_tokens() -> None:
    case = Case((30000, 2, 16, 2048), "gaussian")
    assert_equal(case, case.run(torch.device("cuda"), True), case.two_steps(True))


@pytest.mark.parametrize("planted", ["byte", "scale", "row", "transposed byte", "block scale"])
def test_a_planted_error_is_noticed(planted: str) -> None:
    case = Case((70, 2, 3, 256), "gaussian")
    rows, channels, both, blocks = case.run(torch.device("cpu"), True)
    row = int(case.real.nonzero()[5])
    if planted == "byte":
        rows[0].view(torch.uint8)[row, 200] ^= 1
    elif planted == "scale":
        both[1][row, 1] *= 2
    elif planted == "row":
        rows[0].view(torch.uint8)[row] = rows[0].view(torch.uint8)[row + 1]
    elif planted == "block scale":
        blocks[1][1, 0] *= 2
    else:
        channels[0].view(torch.uint8)[130, row] ^= 1
    with pytest.raises(AssertionError, match="data|scale|blocks"):
        assert_equal(case, (rows, channels, both, blocks), case.two_steps(True))


def test_fake_outputs_match_real_ones() -> None:
    case = Case((50, 2, 3, 256), "gaussian")
    x, rows, slots = case.x, case.row_of_slot, case.slot_of_row
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (cast_permute.cast_permute, (x, rows, slots, True)),
        (cast_permute.cast_permute_to_channel, (x, slots, 2, True, False)),
        (cast_permute.cast_permute_to_channel, (x, slots, 2, True, True)),
        (cast_permute.cast_permute_both, (x, slots, 2, True)),
        (permute.permute_fp8, (*reference.cast_per_token(x, True), rows, slots)),
    ]
    for call, args in calls:
        real = call(*args)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = call(*fakes)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), call


X = torch.zeros((4, 256), dtype=torch.bfloat16)
SLOTS = torch.full((128,), -2, dtype=torch.int32)
MAP = torch.zeros((4, 2), dtype=torch.int32)

BAD_CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "x dtype": (cast_permute.cast_permute, (X.int(), MAP, SLOTS, True), "x: expected torch.bfl"),
    "x width": (
        cast_permute.cast_permute_both,
        (X[:, :100].contiguous(), SLOTS, 2, True),
        "x: H: expected a multiple of 128, got 100",
    ),
    "x stride": (cast_permute.cast_permute, (X.t(), MAP, SLOTS, True), "x: "),
    "map tokens": (
        cast_permute.cast_permute,
        (X, MAP[:3], SLOTS, True),
        r"row_of_slot: expected shape \(4, K\), got \(3, 2\)",
    ),
    "rows": (
        cast_permute.cast_permute_to_channel,
        (X, SLOTS[:100], 2, True, False),
        "slot_of_row: expected a multiple of 128 rows",
    ),
    "topk": (
        cast_permute.cast_permute_to_channel,
        (X, SLOTS, 0, True, True),
        "topk: expected at least 1, got 0",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case: str) -> None:
    call, args, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(*args)
