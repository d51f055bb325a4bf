"""What it takes to check and to time the kernels: FP64 oracles, gates, ragged groups, timers.

A gate compares a GEMM with FP64 arithmetic on the *same FP8 inputs*, by its worst row. The usual
similarity over the whole tensor still passes with a whole row zeroed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fp8moe.kernels.fp8tensor import BLOCK, FP8Tensor, ceil_div
from fp8moe.timing import sustained_us as sustained_us
from fp8moe.timing import time_kernel_us as time_kernel_us

BF16_ROW_ERROR = 2.5e-3
"""Gate on `worst_row_error` of a BF16 result with rows of 64 elements or more.

Rounding the output alone makes about 1.7e-3, and up to 2**-8 = 3.9e-3 in a row of a few elements.
"""

FP32_ROW_ERROR = 5e-4
"""Gate on `worst_row_error` of an FP32 result.

Hopper's tensor cores keep about 14 bits of the sum over a k-block: 1.3e-4 was measured on an H200.
The FP32 sums of the CPU backend stay below 1e-6.
"""

SQNR_FORWARD_DB = 27.0
SQNR_GRADIENT_DB = 26.0
"""Gates on `sqnr_db` of one FP8 GEMM against exact arithmetic on unquantized Gaussian inputs."""

_CHUNK_ROWS = 2048


# ------------------------------------------------------------------------------------ FP64 oracles


def exact(t: FP8Tensor) -> torch.Tensor:
    """x[..., i, j] = data[..., i, j] * scale[..., i or i // 128, j // 128], FP64: no rounding.

    Args:
        t: any granularity, told by the scale's shape as in `fp8moe.quant.dequantize`.
    """
    data, scale = t.data.double(), t.scale.double()
    if scale.shape[-2] != data.shape[-2]:
        scale = scale.repeat_interleave(BLOCK, dim=-2)[..., : data.shape[-2], :]
    return data * scale.repeat_interleave(BLOCK, dim=-1)[..., : data.shape[-1]]


def _spans(group_ends: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    start = 0
    for g, end in enumerate(group_ends.tolist()):
        yield g, start, end
        start = end


def oracle_gemm_nt(a: FP8Tensor, b: FP8Tensor) -> torch.Tensor:
    """D[m, n] = sum_k A[m, k] * B[n, k] in FP64.

    Args:
        a: (M, K) per_token. b: (N, K) per_block or per_token.

    Returns:
        (M, N) float64.
    """
    b_t = exact(b).t()
    out = torch.empty((a.data.shape[0], b_t.shape[1]), dtype=torch.float64, device=b_t.device)
    for lo in range(0, len(out), _CHUNK_ROWS):
        at = slice(lo, lo + _CHUNK_ROWS)
        out[at] = exact(FP8Tensor(a.data[at], a.scale[at])) @ b_t
    return out


def oracle_m_grouped_gemm_nt(a: FP8Tensor, b: FP8Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """D[m, n] = sum_k A[m, k] * B[g, n, k] in FP64, g the group of row m.

    Args:
        a: (M, K) per_token. b: (E, N, K) per_block. group_ends: (E,) integers, cumulative.

    Returns:
        (group_ends[-1], N) float64: rows past the last group have no value.
    """
    parts = [
        oracle_gemm_nt(FP8Tensor(a.data[lo:hi], a.scale[lo:hi]), FP8Tensor(b.data[g], b.scale[g]))
        for g, lo, hi in _spans(group_ends)
    ]
    return torch.cat(parts)


def oracle_m_grouped_gemm_nt_masked(
    a: FP8Tensor, b: FP8Tensor, group_sizes: torch.Tensor
) -> list[torch.Tensor]:
    """D[g][m, n] = sum_k A[g, m, k] * B[g, n, k] in FP64, m < group_sizes[g].

    Args:
        a: (E, M, K) per_token. b: (E, N, K) per_block. group_sizes: (E,) integers.

    Returns:
        E tensors (group_sizes[g], N) float64.
    """
    return [
        oracle_gemm_nt(
            FP8Tensor(a.data[g, :size], a.scale[g, :size]), FP8Tensor(b.data[g], b.scale[g])
        )
        for g, size in enumerate(group_sizes.tolist())
    ]


def oracle_k_grouped_gemm(a_t: FP8Tensor, b_t: FP8Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """D[g, n, k] = sum_r A_t[n, r] * B_t[k, r] in FP64 over the columns r of group g.

    Args:
        a_t: (N, R) per_channel, b_t: (K, R) the same with block scales: group g starts at a
            multiple of 128.
        group_ends: (E,) integers, cumulative, without padding.

    Returns:
        (E, N, K) float64; an empty group gives zeros.
    """
    n, k, e = a_t.data.shape[0], b_t.data.shape[0], len(group_ends)
    out = torch.zeros((e, n, k), dtype=torch.float64, device=a_t.data.device)
    column = 0
    for g, lo, hi in _spans(group_ends):
        end = column + hi - lo
        for c in range(column, end, _CHUNK_ROWS):
            at = slice(c, min(c + _CHUNK_ROWS, end))
            blocks = slice(at.start // BLOCK, ceil_div(at.stop, BLOCK))
            x = exact(FP8Tensor(a_t.data[:, at], a_t.scale[:, blocks]))
            y = exact(FP8Tensor(b_t.data[:, at], b_t.scale[:, blocks]))
            out[g] += x @ y.t()
        column += ceil_div(hi - lo, BLOCK) * BLOCK
    return out


# ------------------------------------------------------------------------------------------- gates


def worst_row_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """max over rows of |out[r] - ref[r]| / |ref[r]|, L2 norms in FP64; a row is the last dimension.

    A zeroed row gives 1. A row whose reference is zero gives 0 if it is zero itself, else infinity.
    A NaN or an Inf anywhere gives infinity.

    Args:
        out, ref: same shape, any float dtype.

    Raises:
        ValueError: the shapes differ.
    """
    if out.shape != ref.shape:
        raise ValueError(f"out: expected {tuple(ref.shape)} as ref, got {tuple(out.shape)}")
    if out.numel() == 0:
        return 0.0
    ref = ref.double()
    error = torch.linalg.vector_norm(out.double() - ref, dim=-1)
    norm = torch.linalg.vector_norm(ref, dim=-1)
    ratio = torch.where((norm == 0) & (error == 0), 0.0, error / norm)
    return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max())


def similarity_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """1 - 2 <out, ref> / (|out|^2 + |ref|^2) over all elements, FP64.

    The field's usual gate is 1e-3. It is here to show what it lets through: with 1000 rows or more,
    one zeroed row passes.
    """
    x, y = out.double(), ref.double()
    return 1.0 - float(2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def sqnr_db(out: torch.Tensor, ref: torch.Tensor) -> float:
    """10 log10(|ref|^2 / |out - ref|^2), signal to quantization noise in dB; -infinity for NaN."""
    out, ref = out.detach().double(), ref.detach().double()
    noise = float((out - ref).square().sum())
    signal = float(ref.square().sum())
    if math.isnan(noise) or math.isnan(signal) or math.isinf(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


# ---------------------------------------------------------------------------------- inputs, poison

GROUP_KINDS = (
    "uniform",
    "zipf",
    "one_hot",
    "empty_first",
    "empty_last",
    "empty_middle",
    "aligned",
    "unaligned",
    "slack",
)
"""Splits that `ragged_group_ends` makes."""


def _split(total: int, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Multinomial counts: `total` draws over `weights`."""
    if total == 0:
        return torch.zeros(len(weights), dtype=torch.int64)
    draws = torch.multinomial(weights, total, replacement=True, generator=generator)
    return torch.bincount(draws, minlength=len(weights))


def ragged_group_ends(
    total: int,
    num_groups: int,
    seed: int,
    kind: str = "uniform",
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Cumulative ends of `num_groups` groups over `total` rows, the same for the same seed.

    Args:
        kind: "uniform": rows drawn uniformly; "zipf": a group's share is 1 / (its rank + 1), ranks
            shuffled; "one_hot": all rows in one group; "empty_first", "empty_last",
            "empty_middle": uniform without that group; "aligned": every size a multiple of 128,
            the remainder of `total` in no group; "unaligned": uniform, sizes that are multiples of
            128 moved by one row; "slack": uniform over the first three quarters of the rows, the
            rest in no group.

    Returns:
        (num_groups,) int32.

    Raises:
        ValueError: an unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(num_groups)
    if kind == "zipf":
        weights = 1 / torch.arange(1, num_groups + 1)
        weights = weights[torch.randperm(num_groups, generator=generator)]
    elif kind == "one_hot":
        weights = torch.zeros(num_groups)
        weights[int(torch.randint(num_groups, (1,), generator=generator))] = 1
    elif kind.startswith("empty_") and num_groups > 1:
        weights[{"first": 0, "last": -1, "middle": num_groups // 2}[kind[6:]]] = 0
    elif kind not in GROUP_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(GROUP_KINDS)}, got {kind!r}")

    if kind == "aligned":
        sizes = _split(total // BLOCK, weights, generator) * BLOCK
    else:
        sizes = _split(total * 3 // 4 if kind == "slack" else total, weights, generator)
    if kind == "unaligned":
        for g in range(num_groups - 1):
            if sizes[g] % BLOCK == 0 and sizes[g + 1] > 0:
                sizes[g] += 1
                sizes[g + 1] -= 1
    return sizes.cumsum(0).int().to(device)


def random_topk(
    num_tokens: int,
    topk: int,
    num_experts: int,
    seed: int,
    kind: str = "uniform",
    dropped: float = 0.0,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing of every token to `topk` different experts, with weights that sum to 1.

    Args:
        kind: "uniform"; "zipf": expert e proportional to 1 / (e + 1); "one_hot": the first `topk`
            experts take all tokens.
        dropped: share of the slots that are dropped (their id is num_experts).

    Returns:
        topk_ids (T, K) int64, topk_weights (T, K) float32.

    Raises:
        ValueError: an unknown kind.
    """
    # Drawn on the CPU whatever the default device: a seed means the same everywhere.
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        if kind == "uniform":
            weights = torch.ones(num_experts)
        elif kind == "zipf":
            weights = 1 / torch.arange(1, num_experts + 1)
        elif kind == "one_hot":
            weights = torch.full((num_experts,), 1e-30)
            weights[:topk] = 1
        else:
            raise ValueError(f"kind: expected uniform, zipf or one_hot, got {kind!r}")
        # Gumbel top-k is drawing without replacement, for all tokens at once.
        noise = torch.rand((num_tokens, num_experts), generator=generator).clamp_min(1e-9)
        ids = (weights.log() - (-noise.log()).log()).topk(topk).indices
        drop = torch.rand((num_tokens, topk), generator=generator) < dropped
        ids = ids.masked_fill(drop, num_experts)
        probabilities = torch.rand((num_tokens, topk), generator=generator).softmax(dim=1)
    return ids.to(device), probabilities.to(device)


_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bit patterns of t as integers of the same size: same shape, on the CPU."""
    return t.detach().cpu().contiguous().view(_INTEGER_OF_SIZE[t.element_size()])


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether shape and every bit agree: -0 differs from 0, and a NaN equals itself.

    FP8 data may be compared with its bytes: only the size of an element has to be the same.
    """
    return torch.equal(bits(actual), bits(expected))


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fills t with NaN (bytes 0x7F for FP8 and uint8, the smallest value for integers); returns t.

    An output made of poison shows which elements a kernel never wrote, an input which it should
    not have read.
    """
    if t.dtype == torch.float8_e4m3fn:
        t.view(torch.uint8).fill_(0x7F)
    elif t.dtype == torch.uint8:
        t.fill_(0x7F)
    elif t.dtype.is_floating_point:
        t.fill_(math.nan)
    else:
        t.fill_(torch.iinfo(t.dtype).min)
    return t
