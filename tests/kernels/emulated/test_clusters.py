"""Clusters of CTAs on the CPU: tiles that are split along K.

One CTA of a cluster after the other runs until it has to wait, so each is as far ahead as it can
get. Copies still land at once and a CTA's warps run nearly in step: a missing fence is not seen,
nor a warp that overwrites what another one of its CTA still reads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8moe import quant, testing
from fp8moe.kernels import gemm
from fp8moe.kernels.fp8tensor import FP8Tensor
from fp8moe.kernels.heuristics import Grouping, Output, Problem, Tile

from .conftest import plant

Start = Any


class Case:
    """Operands of a dense problem, their rows of magnitudes far apart."""

    def __init__(self, m: int, n: int, k: int) -> None:
        x = torch.randn(m, k) * torch.randint(-4, 5, (m, 1)).exp2()
        w = torch.randn(n, k) * torch.rand(n, 1)
        self.a = quant.per_token(x.bfloat16(), pow2=True)
        self.b = quant.per_block(w.bfloat16(), pow2=False)
        self.exact = testing.oracle_gemm_nt(FP8Tensor(*self.a), FP8Tensor(*self.b))

    def check(self, tile: Tile, band: int = 2, output: Output = Output.BF16) -> None:
        (m, k), n = self.a.data.shape, self.b.data.shape[0]
        out = torch.empty((m, n), dtype=torch.bfloat16 if output == Output.BF16 else torch.float32)
        p = Problem(Grouping.DENSE, output, m, n, k)
        gemm._launch(p, *self.a, *self.b, None, out, (tile, band))
        gate = testing.BF16_ROW_ERROR if output == Output.BF16 else testing.FP32_ROW_ERROR
        assert testing.worst_row_error(out, self.exact) < gate


@pytest.mark.parametrize("tile", [Tile(64, 32, 4), Tile(64, 64, 8), Tile(64, 128, 2)], ids=str)
@pytest.mark.parametrize("k", [1296, 400, 112])
def test_split_tiles(emulated: Start, tile: Tile, k: int) -> None:
    """Also parts that are uneven or have nothing to contract."""
    case = Case(70, 136, k)
    words = emulated(gemm)
    case.check(tile)
    assert not words.any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("blocks * rank / SPLITS", "0"),
        ("    cluster_barrier();\n    if (owner)", "    if (owner)"),
        ("    cluster_barrier();  // shared", "// shared"),
        ("(rank + next) % SPLITS", "rank"),
        ("warp % SPLITS == rank", "warp % SPLITS == 0"),
    ],
    ids=["part", "sums are there", "end", "whose sums", "owner"],
)
def test_a_planted_error_of_split_tiles_is_seen(
    emulated: Start, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    case = Case(70, 136, 1296)
    emulated(gemm)
    plant(monkeypatch, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        case.check(Tile(64, 64, 4))
