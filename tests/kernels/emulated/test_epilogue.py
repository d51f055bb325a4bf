"""The SwiGLU epilogue of the GEMM on the CPU: the scheduler's tiles, the store, nothing in between.

The accumulators come from memory, in the layout that wgmma leaves them in. The bits are compared
with those of swiglu.cuh, run here too on the same values rounded to BF16.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp8moe.kernels import jit, swiglu
from fp8moe.kernels.fp8tensor import BLOCK, FP8_DTYPE, ceil_div, empty_scale

from .test_emulated import assert_same, plant

SOURCE = """
#include "CSRC/epilogue_swiglu.cuh"
extern "C" __global__ void __launch_bounds__(256) epilogue(
    const float* h, const Destination d, const float* weights, const int* slots, const int* ends,
    int* status, int m, int n, int num_groups, int band) {
  extern __shared__ __align__(1024) char smem[];
  int* table = (int*)(smem + 8 * STAGING_BYTES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Problem problem{m, n, 128, num_groups, band, ends};
  if (warp == 0) fill_group_table(problem, table, status);
  __syncthreads();
  Scheduler scheduler(problem, table);
  for (int index = blockIdx.x; index < scheduler.num_tiles; index += gridDim.x) {
    const Tile t = scheduler.tile(index);
    const int warp_row = warp / 4 * 64 + warp % 4 * 16;
    float sum[2][64];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 64; ++i) {
        const int row = warp_row + lane / 4 + (i & 2 ? 8 : 0);
        const int column = t.column + half * (n / 2) + i / 4 * 8 + lane % 4 * 2 + i % 2;
        sum[half][i] = row < t.rows ? h[(t.d_row + row) * n + column] : __uint_as_float(~0u);
      }
    store(sum, smem + warp * STAGING_BYTES, nullptr, d, problem, t, warp_row, 0);
  }
}
"""


class Case:
    """Rows of h in FP32 by group, a routing map with padding; what both kernels make of them."""

    def __init__(self, sizes: list[int], width: int, slack: int = 0) -> None:
        self.width, self.used = width, sum(sizes)
        self.ends = torch.tensor(sizes).cumsum(0).int()
        self.rows = ceil_div(self.used + slack, BLOCK) * BLOCK
        self.h = 3 * torch.randn(self.rows, 2 * width)
        self.h *= torch.randint(-5, 6, (self.rows, 1)).exp2()
        slots = torch.randperm(self.rows)
        slots[torch.rand(self.rows) < 0.1] = -1
        slots[self.used :] = -1
        slots[ceil_div(self.used, BLOCK) * BLOCK :] = -2
        self.slots = slots.int()
        self.weights = torch.rand(self.rows, 1)
        pad = self.slots < 0
        self.h[pad] = math.nan
        if self.used:
            self.h[: self.used][~pad[: self.used]][5:9, 3] = math.inf

    def outputs(self) -> tuple[torch.Tensor, ...]:
        rows, width = self.rows, self.width
        shapes = ((rows, width), (rows, 2 * width))
        return tuple(
            t
            for r, c in shapes
            for t in (torch.empty((r, c), dtype=FP8_DTYPE), empty_scale(r, c // BLOCK))
        )

    def fused(self, folder: Path, pow2: bool) -> tuple[torch.Tensor, ...]:
        source = folder / "epilogue.cuh"
        source.write_text(SOURCE.replace("CSRC", str(jit.CSRC)))
        constants = (
            ("GROUPING", 1),
            ("OUTPUT", 3),
            ("BLOCK_M", 128),
            ("BLOCK_N", 256),
            ("POW2", int(pow2)),
        )
        out = self.outputs()
        pointers = [t.data_ptr() for t in (*out, self.weights, self.slots)]
        destination = struct.pack("@PPPPPPi4x", *pointers, out[1].stride(1))
        status = torch.zeros(8, dtype=torch.int32)
        arguments = [self.h, destination, self.weights, self.slots, self.ends, status]
        sizes = [self.rows, 2 * self.width, len(self.ends), 2]
        jit.load(jit.KernelSpec(str(source), "epilogue", constants))(3, 256, arguments + sizes)
        assert not status.any()
        return out

    def apart(self, pow2: bool) -> tuple[torch.Tensor, ...]:
        out = self.outputs()
        h = self.h.bfloat16()
        swiglu._launch_forward(h, self.weights, self.slots, pow2, out[:2], out[2:], None)
        return out

    def check(self, fused: tuple[torch.Tensor, ...], apart: tuple[torch.Tensor, ...]) -> None:
        for got, wanted in zip(fused, apart, strict=True):
            assert_same(got[: self.used], wanted[: self.used])
            rest = got.t()[:, self.used :].contiguous().view(torch.uint8)
            assert (rest == 0xA5).all(), "wrote past the last group"


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax"])
@pytest.mark.parametrize(
    ("sizes", "width"),
    [([40, 0, 131, 1, 0, 256], 256), ([0, 300, 0], 128), ([128, 128], 384)],
    ids=str,
)
def test_bits_of_the_separate_kernel(
    emulated: Callable, tmp_path: Path, sizes: list[int], width: int, pow2: bool
) -> None:
    emulated(swiglu)
    case = Case(sizes, width, slack=130)
    case.check(case.fused(tmp_path, pow2), case.apart(pow2))


def test_no_rows_at_all(emulated: Callable, tmp_path: Path) -> None:
    emulated(swiglu)
    case = Case([0, 0, 0], 128, slack=128)
    case.check(case.fused(tmp_path, True), case.outputs())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x7632), __byte_perm(v.z", "0x5410), __byte_perm(v.z"),
        ("lane % 16, c + lane / 16)", "lane % 16, c + lane / 8 % 2)"),
        ("first_row + lane % 16) : kPad", "first_row + lane % 8) : kPad"),
        ("r < rows);", "true);"),
        ("g[i] = u[i] = 0", "g[i] = 0"),
        ("block_scale<kPow2>(act_maxima << 16)", "block_scale<kPow2>(act_maxima)"),
        ("which == 1 ? half_n / 128 : 0", "0"),
    ],
    ids=["order", "panel", "slot", "group end", "padding", "scale", "block"],
)
def test_a_planted_error_is_seen(
    emulated: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    emulated(swiglu)
    case = Case([40, 0, 131], 128)
    apart = case.apart(True)
    plant(monkeypatch, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        case.check(case.fused(tmp_path, True), apart)
