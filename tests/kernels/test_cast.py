"""The cast operators against plain loops over blocks, bit by bit, on the CPU and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8moe.kernels import cast, jit, reference
from fp8moe.kernels.fp8tensor import AMAX_FLOOR, FP8_DTYPE, ceil_div, padded_capacity, scale_ld
from fp8moe.testing import same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pow2s = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])


# ------------------------------------------------------------------------------ plain-loop oracle

# All non-negative finite E4M3 values, by byte.
E4M3 = [
    math.ldexp(b & 7, -9) if b < 8 else math.ldexp(8 + (b & 7), (b >> 3) - 10) for b in range(0x7F)
]


def f32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float())


def e4m3_byte(x: float) -> int:
    """The byte of the E4M3 value nearest to x, ties to the even byte; beyond 448 it is 448."""
    size = min(abs(x), 448.0)
    nearest = min(range(len(E4M3)), key=lambda b: (abs(E4M3[b] - size), b & 1))
    return nearest | (0x80 if math.copysign(1.0, x) < 0 else 0)


def cast_block(block: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, float]:
    """Bytes and scale of one block, element by element in Python floats (FP64)."""
    values = block.double().flatten().tolist()
    if not all(math.isfinite(v) for v in values):
        return torch.full(block.shape, 0x7F, dtype=torch.uint8), math.nan
    amax = max([AMAX_FLOOR, *(abs(v) for v in values)])
    scale = f32(amax / 448.0)
    inv = f32(448.0 / amax)
    if pow2:
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
        inv = 1.0 / scale
    data = [e4m3_byte(f32(v * inv)) for v in values]
    return torch.tensor(data, dtype=torch.uint8).view(block.shape), scale


def loop_per_token(x: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    data = torch.empty((m, k), dtype=torch.uint8)
    scale = torch.empty((m, ceil_div(k, 128)))
    for i in range(m):
        for j in range(scale.shape[1]):
            at = slice(128 * j, 128 * j + 128)
            data[i, at], scale[i, j] = cast_block(x[i, at], pow2)
    return data, scale


def loop_per_block(w: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    e, n, k = w.shape
    data = torch.empty((e, n, k), dtype=torch.uint8)
    scale = torch.empty((e, ceil_div(n, 128), ceil_div(k, 128)))
    for g in range(e):
        for i in range(scale.shape[1]):
            for j in range(scale.shape[2]):
                rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                data[g, rows, columns], scale[g, i, j] = cast_block(w[g, rows, columns], pow2)
    return data, scale


def loop_per_channel(
    x: torch.Tensor, sizes: list[int], pow2: bool, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Only the used columns; one scale for `width` channels."""
    blocks, scales, first = [], [], 0
    for size in sizes:
        for row in range(first, first + size, 128):
            block = torch.zeros((128, x.shape[1]), dtype=x.dtype)
            end = min(row + 128, first + size)
            block[: end - row] = x[row:end]
            parts = [cast_block(channels, pow2) for channels in block.split(width, dim=1)]
            blocks.append(torch.cat([p[0] for p in parts], dim=1).t())
            scales.append(torch.tensor([p[1] for p in parts]))
        first += size
    return torch.cat(blocks, dim=1), torch.stack(scales, dim=1)


# ------------------------------------------------------------------------------------------- inputs


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Gaussian values whose rows are scaled by powers of two up to 2**30 apart, some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    reach = 7 if dtype == torch.float16 else 15
    x *= torch.randint(-reach, reach + 1, (*shape[:-1], 1), generator=generator).exp2()
    return x.masked_fill_(torch.rand(shape, generator=generator) < 0.05, 0.0).to(dtype)


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """Rows of 300 columns that each break one careless cast."""
    info = torch.finfo(dtype)
    ramp = torch.linspace(-1.0, 1.0, 300)
    tiny = info.smallest_normal / 8
    rows = [
        torch.zeros(300),
        -torch.zeros(300),
        torch.full((300,), info.max),
        torch.full((300,), tiny),
        ramp * tiny * 64,
        ramp.clone().index_fill_(0, torch.tensor([5]), math.nan),
        ramp.clone().index_fill_(0, torch.tensor([131]), math.inf),
        ramp.clone().index_fill_(0, torch.tensor([299]), -math.inf),
        torch.tensor([math.nan, math.inf] * 150),
        torch.where(torch.arange(300) % 128 == 0, info.max, 2.0**-12),
        torch.where(torch.arange(300) % 2 == 0, 2.0**15, 2.0**-15),
        # Halfway between two E4M3 values, also in the subnormal range.
        torch.tensor([448.0, 17.0, 19.0, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10] + [0.0] * 293),
    ]
    # amax exactly 448 * 2**n, and one step of the dtype to either side.
    for n in (-14, -1, 0, 5):
        exact = torch.full((300,), 448.0 * 2.0**n).to(dtype)
        up = torch.nextafter(exact, torch.full_like(exact, math.inf))
        down = torch.nextafter(exact, torch.zeros_like(exact))
        rows += [(t.float() * ramp.sign()) for t in (exact, up, down)]
    if dtype != torch.float16:
        rows += [ramp * 2.0**n for n in (-126, -60, -49, -48, -47, 60, 127)]
    return torch.stack(rows).to(dtype)


def ends_of(sizes: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int().to(device)


# ------------------------------------------------------------------------------------------- checks


def same_all(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return len(actual) == len(expected) and all(map(same_bits, actual, expected))


def loop_cases(dtype: torch.dtype) -> list[torch.Tensor]:
    return [values((5, 300), dtype), adversarial(dtype)]


# ------------------------------------------------------------------- meaning, on both CPU and GPU


@dtypes
@pow2s
def test_per_token_is_the_loop(device: torch.device, dtype: torch.dtype, pow2: bool) -> None:
    for x in loop_cases(dtype):
        assert same_all(cast.cast_per_token(x.to(device), pow2), loop_per_token(x, pow2))


@dtypes
@pow2s
def test_per_block_is_the_loop(device: torch.device, dtype: torch.dtype, pow2: bool) -> None:
    for x in loop_cases(dtype):
        w = torch.stack([x, x.flip(0)])
        data, scale = loop_per_block(w, pow2)
        assert same_all(cast.cast_per_block(w.to(device), pow2), (data, scale))
        both = cast.cast_per_block_both(w.to(device), pow2)
        assert same_all(both, (data, scale, data.mT, scale.mT))


@pytest.mark.parametrize("block", [False, True], ids=["channels", "blocks"])
@dtypes
@pow2s
def test_per_channel_is_the_loop(
    device: torch.device, dtype: torch.dtype, pow2: bool, block: bool
) -> None:
    sizes = [0, 3, 0, 130, 128, 0]
    x = torch.cat([values((200, 9), dtype), adversarial(dtype).t()[:64, :9]])
    if block:
        x = torch.cat([x, values((264, 121), dtype, seed=1)], dim=1)
        x[3:133, :128] = 0
    data, scale = cast.cast_per_channel(x.to(device), ends_of(sizes, device), pow2, block)
    expected = loop_per_channel(x, sizes, pow2, 128 if block else 1)
    used = expected[0].shape[1]
    assert same_all((data[:, :used], scale[:, : used // 128]), expected)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 300), (128, 256), (144, 528)])
def test_transpose_moves_bytes(device: torch.device, n: int, k: int) -> None:
    data = torch.randint(0, 256, (3, n, k), dtype=torch.uint8)
    scale = torch.randn(3, ceil_div(n, 128), ceil_div(k, 128))
    actual = cast.transpose_per_block(data.view(FP8_DTYPE).to(device), scale.to(device))
    assert same_all(actual, (data.mT, scale.mT))


def test_any_strides(device: torch.device) -> None:
    x = values((300, 257), torch.bfloat16).to(device)
    ends = ends_of([100, 157], device)
    row = values((1, 300), torch.bfloat16).to(device)
    assert same_all(cast.cast_per_token(x.t(), True), cast.cast_per_token(x.t().clone(), True))
    assert same_all(
        cast.cast_per_token(row.expand(5, 300), True), cast.cast_per_token(row.repeat(5, 1), True)
    )
    w = x.reshape(3, 100, 257)
    assert same_all(cast.cast_per_block(w.mT, True), cast.cast_per_block(w.mT.clone(), True))
    channel = cast.cast_per_channel(x.t(), ends, True, False)
    expected = cast.cast_per_channel(x.t().clone(), ends, True, False)
    assert same_all(
        (channel[0][:, :384], channel[1][:, :3]), (expected[0][:, :384], expected[1][:, :3])
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(device: torch.device, shape: tuple[int, int]) -> None:
    x = torch.empty(shape, device=device)
    rows, columns = shape
    data, scale = cast.cast_per_token(x, True)
    assert data.shape == shape and scale.shape == (rows, ceil_div(columns, 128))
    data, scale, data_t, scale_t = cast.cast_per_block_both(x[None], True)
    assert data.shape == (1, *shape) and data_t.shape == (1, columns, rows)
    assert cast.transpose_per_block(data, scale)[0].shape == data_t.shape
    for block in (False, True):
        data, _ = cast.cast_per_channel(x, ends_of([rows, 0], device), True, block)
        assert data.shape == (columns, padded_capacity(rows, 2))


def test_layouts(device: torch.device) -> None:
    x = torch.randn(130, 260, device=device)
    data, scale = cast.cast_per_token(x, True)
    assert data.dtype == FP8_DTYPE and data.is_contiguous() and data.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (130, 3)
    assert scale.stride() == (1, scale_ld(130)) and scale_ld(130) == 132
    data, scale = cast.cast_per_channel(x, ends_of([1, 129], device), True, False)
    assert data.is_contiguous() and data.shape == (260, 384)
    assert scale.shape == (260, 3) and scale.stride() == (1, 260)
    data, scale = cast.cast_per_channel(x, ends_of([1, 129], device), True, True)
    assert data.is_contiguous() and data.shape == (260, 384)
    assert scale.shape == (3, 3) and scale.is_contiguous()
    _, scale, _, scale_t = cast.cast_per_block_both(x[None], True)
    assert scale.is_contiguous() and scale_t.is_contiguous()
    assert scale.shape == (1, 2, 3) and scale_t.shape == (1, 3, 2)


def test_cpu_raises_bad_group_ends() -> None:
    x = torch.randn(200, 64)
    for ends in ([5, 3, 200], [5, 200, 201]):
        with pytest.raises(ValueError, match=r"group_ends\[\d\]"):
            cast.cast_per_channel(x, torch.tensor(ends, dtype=torch.int32), True, False)


# --------------------------------------------------------------------------------- negative control


def test_planted_errors_are_seen() -> None:
    x = values((130, 260), torch.bfloat16)
    data, scale = reference.cast_per_token(x, False)
    assert same_all((data, scale), (data.clone(), scale.clone()))
    flipped = data.clone()
    flipped.view(torch.uint8)[129, 259] ^= 1
    assert not same_bits(flipped, data)
    nudged = scale.clone()
    nudged[0, 2] = torch.nextafter(nudged[0, 2], torch.tensor(math.inf))
    assert not same_bits(nudged, scale)
    zero = torch.zeros(4)
    assert not same_bits(-zero, zero)
    # A reciprocal multiplied in place of a division is one of the errors the loops must see.
    amax = x.abs().amax(dim=1).float()
    assert not same_bits(amax / torch.full_like(amax, 448.0), amax * torch.tensor(1.0 / 448.0))


# ----------------------------------------------------------------------------------- fake, compile


def ops_with_arguments(device: torch.device | str) -> list[tuple[Callable, tuple]]:
    x = torch.randn(130, 260, device=device, dtype=torch.bfloat16)
    w = torch.randn(2, 130, 260, device=device, dtype=torch.bfloat16)
    data, scale = cast.cast_per_block(w, True)
    return [
        (cast.cast_per_token, (x, True)),
        (cast.cast_per_block, (w, False)),
        (cast.cast_per_block_both, (w, True)),
        (cast.transpose_per_block, (data, scale)),
        (cast.cast_per_channel, (x, ends_of([3, 100, 0, 27], device), True, False)),
        (cast.cast_per_channel, (x, ends_of([3, 100, 0, 27], device), True, True)),
    ]


def test_fake_outputs_match_real_ones(device: torch.device) -> None:
    for op, args in ops_with_arguments(device):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = op(*fake_args)
        for r, f in zip(real, fake, strict=True):
            assert (f.shape, f.stride(), f.dtype, f.device) == (
                r.shape,
                r.stride(),
                r.dtype,
                r.device,
            ), op.__name__


def test_compiles_as_one_graph() -> None:
    def casts(x: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *cast.cast_per_token(x, True), *cast.cast_per_channel(x, ends, True, False)

    compiled = torch.compile(casts, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (130, 200):
        x, ends = torch.randn(rows, 64), ends_of([rows - 30, 30])
        used = ceil_div(rows - 30, 128) * 128 + 128
        trim = (slice(None), slice(None), slice(used), slice(used // 128))
        for actual, expected, at in zip(compiled(x, ends), casts(x, ends), trim, strict=True):
            assert same_bits(actual[:, at], expected[:, at])


# ----------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cast.cast_per_token(torch.zeros(2, 3, dtype=torch.float64), True),
            "x: expected torch.bfloat16 or torch.float16 or torch.float32, got torch.float64",
        ),
        (
            lambda: cast.cast_per_token(torch.zeros(3), True),
            r"x: expected shape \(M, K\), got \(3,\)",
        ),
        (
            lambda: cast.cast_per_block(torch.zeros(2, 3), True),
            r"w: expected shape \(E, N, K\), got \(2, 3\)",
        ),
        (
            lambda: cast.cast_per_block_both(torch.zeros(1, 2, 3, dtype=torch.int32), True),
            "w: expected torch.bfloat16 or torch.float16 or torch.float32, got torch.int32",
        ),
        (
            lambda: cast.transpose_per_block(torch.zeros(1, 2, 3), torch.zeros(1, 1, 1)),
            "data: expected torch.float8_e4m3fn, got torch.float32",
        ),
        (
            lambda: cast.transpose_per_block(
                torch.zeros(1, 2, 300).to(FP8_DTYPE), torch.zeros(1, 1, 2)
            ),
            r"scale: expected shape \(1, 1, 3\), got \(1, 1, 2\)",
        ),
        (
            lambda: cast.transpose_per_block(
                torch.zeros(1, 2, 3).to(FP8_DTYPE), torch.zeros(1, 1, 1, dtype=torch.float64)
            ),
            "scale: expected torch.float32, got torch.float64",
        ),
        (
            lambda: cast.cast_per_channel(torch.zeros(4, 3), torch.tensor([4]), True, False),
            "group_ends: expected torch.int32, got torch.int64",
        ),
        (
            lambda: cast.cast_per_channel(torch.zeros(4, 3), torch.zeros(1, 1).int(), True, False),
            r"group_ends: expected shape \(E\), got \(1, 1\)",
        ),
        (
            lambda: cast.cast_per_channel(
                torch.zeros(4, 3), torch.zeros(1, dtype=torch.int32, device="meta"), True, False
            ),
            "group_ends: expected a tensor on cpu, got meta",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_kernel_specs_are_distinct_and_exist() -> None:
    specs = cast.kernel_specs()
    assert len(set(specs)) == len(specs) == (3 + 2) * 3 * 2 * 2 + 2
    for spec in specs:
        assert f"\n{spec.entry}(" in jit.render(spec) or f" {spec.entry}(" in jit.render(spec)
