"""The cast kernels on a GPU against the reference, bit by bit: sizes, groups, poison, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from fp8moe import testing
from fp8moe.kernels import cast, reference, status
from fp8moe.kernels.fp8tensor import ceil_div
from fp8moe.testing import bits, same_bits

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 7, 16, 127, 128, 129, 144, 256, 257, 400)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pow2s = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Gaussian values whose rows are scaled by powers of two up to 2**30 apart, some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    reach = 7 if dtype == torch.float16 else 15
    x *= torch.randint(-reach, reach + 1, (*shape[:-1], 1), generator=generator).exp2()
    return x.masked_fill_(torch.rand(shape, generator=generator) < 0.05, 0.0).to(dtype)


def ends_of(sizes: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int().to(device)


def same_all(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return len(actual) == len(expected) and all(map(same_bits, actual, expected))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA implementations get output buffers full of NaN."""
    for name in ("_per_token_outputs", "_per_block_outputs", "_per_channel_outputs"):
        make = getattr(cast, name)

        def wrapped(*args, make: Callable = make) -> tuple[torch.Tensor, ...]:
            return tuple(testing.poison(t) for t in make(*args))

        monkeypatch.setattr(cast, name, wrapped)


@pytest.mark.usefixtures("poisoned")
@dtypes
@pow2s
def test_cuda_rows_and_blocks(dtype: torch.dtype, pow2: bool) -> None:
    for i, m in enumerate(SIZES):
        for j, k in enumerate(SIZES):
            x = values((m, k), dtype, seed=10 * i + j)
            assert same_all(
                cast.cast_per_token(x.cuda(), pow2), reference.cast_per_token(x, pow2)
            ), ("per_token", m, k)
            w = values((2, m, k), dtype, seed=10 * i + j)
            expected = reference.cast_per_block_both(w, pow2)
            assert same_all(cast.cast_per_block(w.cuda(), pow2), expected[:2]), ("block", m, k)
            assert same_all(cast.cast_per_block_both(w.cuda(), pow2), expected), ("both", m, k)
            moved = cast.transpose_per_block(expected[0].cuda(), expected[1].cuda())
            assert same_all(moved, expected[2:]), ("transpose", m, k)


GROUPS = [
    [1],
    [128],
    [129, 127],
    [0, 0, 5, 0],
    [300, 0, 0, 1, 128, 0],
    [0] * 40 + [7] + [0] * 40,
    [3] * 33,
    [17, 128, 0, 256] * 33,
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block", [False, True], ids=["channels", "blocks"])
@pytest.mark.parametrize("slack", [0, 131])
@dtypes
@pow2s
def test_cuda_channels(dtype: torch.dtype, pow2: bool, slack: int, block: bool) -> None:
    for sizes in GROUPS:
        used = sum(ceil_div(s, 128) * 128 for s in sizes)
        for n in (1, 7, 16, 128, 136, 257):
            x = values((sum(sizes) + slack, n), dtype, seed=n)
            if slack:
                x[sum(sizes) :] = math.nan  # rows in no group
            ends = ends_of(sizes)
            data, scale = cast.cast_per_channel(x.cuda(), ends.cuda(), pow2, block)
            expected = reference.cast_per_channel(x, ends, pow2, block)
            actual = (data[:, :used], scale[:, : used // 128])
            wanted = (expected[0][:, :used], expected[1][:, : used // 128])
            assert same_all(actual, wanted), (sizes, n)
            assert (bits(data)[:, used:] == 0x7F).all(), "wrote past the last group"
            assert scale[:, used // 128 :].isnan().all(), "wrote past the last group"


@pow2s
@pytest.mark.parametrize("block", [False, True], ids=["channels", "blocks"])
def test_cuda_misaligned_start(pow2: bool, block: bool) -> None:
    flat = values((1, 128 * 256 + 1), torch.bfloat16)[0]
    x = flat[1:].view(128, 256)
    on_gpu = flat.cuda()[1:].view(128, 256)
    assert on_gpu.data_ptr() % 16 and on_gpu.is_contiguous()
    assert same_all(cast.cast_per_token(on_gpu, pow2), reference.cast_per_token(x, pow2))
    both = cast.cast_per_block_both(on_gpu[None], pow2)
    assert same_all(both, reference.cast_per_block_both(x[None], pow2))
    ends = ends_of([128])
    channel = cast.cast_per_channel(on_gpu, ends.cuda(), pow2, block)
    expected = reference.cast_per_channel(x, ends, pow2, block)
    assert same_all(
        (channel[0][:, :128], channel[1][:, :1]), (expected[0][:, :128], expected[1][:, :1])
    )


def test_cuda_same_from_run_to_run() -> None:
    x = values((1000, 1040), torch.bfloat16).cuda()
    ends = ends_of([300, 0, 700], "cuda")
    used = 384 + 768
    for block in (False, True):
        first = [cast.cast_per_channel(x, ends, True, block) for _ in range(2)]
        assert same_all(
            (first[0][0][:, :used], first[0][1][:, : used // 128]),
            (first[1][0][:, :used], first[1][1][:, : used // 128]),
        )


@pytest.mark.slow
def test_cuda_more_than_2_31_elements() -> None:
    """The last rows and experts are cast as they are alone."""
    rows, columns = 75 * 4096, 7168
    assert rows * columns > 2**31
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    data, scale = cast.cast_per_token(x, True)
    tail = cast.cast_per_token(x[-128:].clone(), True)
    assert same_all((data[-128:], scale[-128:]), tail)
    del data, scale
    ends = torch.tensor([rows - 128, rows], dtype=torch.int32, device="cuda")
    corner, end = x[-128:, -128:].clone(), torch.full_like(ends[:1], 128)
    used = slice(rows - 128, rows)
    for block, channels in ((False, 128), (True, 1)):
        data, scale = cast.cast_per_channel(x, ends, True, block)
        alone = cast.cast_per_channel(corner, end, True, block)
        assert same_all(
            (data[-128:, used], scale[-channels:, rows // 128 - 1]),
            (alone[0][:, :128], alone[1][:, 0]),
        )
        del data, scale
    w = x.view(75, 4096, columns)
    whole = cast.cast_per_block_both(w, True)
    last = cast.cast_per_block_both(w[-1:].clone(), True)
    assert same_all(tuple(t[-1:] for t in whole), last)
    moved = cast.transpose_per_block(whole[0], whole[1])
    assert same_all(tuple(t[-1:] for t in moved), last[2:])


@pytest.fixture
def no_pending_error() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    try:
        status.check_errors()
    except ValueError:
        pass


@pytest.mark.usefixtures("no_pending_error")
@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([5, 3, 200], r"non-decreasing sequence, got group_ends\[1\] = 3 after 5"),
        ([-1, 3, 200], r"non-decreasing sequence, got group_ends\[0\] = -1 after 0"),
        ([5, 201, 200], r"at most 200 .* got group_ends\[1\] = 201"),
        ([5, 200, 2**31 - 1], r"at most 200 .* got group_ends\[2\] = 2147483647"),
    ],
)
def test_cuda_reports_bad_group_ends(ends: list[int], message: str) -> None:
    x = torch.randn(200, 64, device="cuda")
    bad = torch.tensor(ends, dtype=torch.int32, device="cuda")
    cast.cast_per_channel(x, bad, True, False)
    with pytest.raises(ValueError, match=message):
        status.check_errors()
    status.check_errors()  # reported once
    many = torch.full((300,), 200, dtype=torch.int32, device="cuda")
    many[::2] = 0  # would need far more columns than there are
    cast.cast_per_channel(x, many, True, False)
    with pytest.raises(ValueError, match="non-decreasing"):
        status.check_errors()
