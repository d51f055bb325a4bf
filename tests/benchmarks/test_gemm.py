"""The GEMM benchmark: what can be checked without a GPU, and its timer on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gemm, harness
from benchmarks.harness import KernelRecord


def test_kernel_time_is_summed_between_flushes():
    names = ["prepare", "flush", "flush", "a", "b", "flush", "c", "flush"]
    records = [KernelRecord(float(i), name, 1.0 + i) for i, name in enumerate(names)]
    assert harness.between_flushes(records, {"flush"}) == [4.0 + 5.0, 7.0, 0.0]


def test_table_cuts_what_is_too_long():
    lines = harness.table([{"op": "x" * 500, "us": 1.25}, {"op": "y"}], ["op", "us"]).splitlines()
    assert lines[1] == "x" * 57 + "...  1.25"
    assert lines[2] == "y".rjust(60) + " " * 6


@pytest.mark.parametrize("groups, mean", [(4, 8192), (8, 4096)])
def test_moved_groups_keep_their_rows_and_end_off_the_blocks(groups, mean):
    sizes = gemm._sizes(gemm.Shape("unaligned", groups, mean, 256, 256, moved=True), mean)
    ends = torch.tensor(sizes).cumsum(0)
    assert len(sizes) == groups and ends[-1] == groups * mean and min(sizes) > 0
    assert (ends[:-1] % 128 != 0).all()


def test_every_family_of_shapes_is_named_once():
    assert len(set(gemm.SHAPES)) == len(gemm.SHAPES)


def test_plot_shows_families_with_and_without_a_peer(tmp_path: Path):
    row = {"G": 1, "m": 2, "n": 3, "k": 4, "tflops": 5.0, "chosen": "*"}
    rows = [
        {"family": "dense", **row, "peer": "cublas", "ratio": 0.5},
        {"family": "masked", **row},
        {"family": "masked", **row, "chosen": ""},
    ]
    gemm.plot(rows, str(tmp_path / "gemm.png"))
    assert (tmp_path / "gemm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_kernel_time_leaves_out_launch_latency():
    x = torch.randn(1 << 24, device="cuda")
    functions = {"one": lambda: x.mul_(1.0), "two": lambda: (x.mul_(1.0), x.mul_(1.0))}
    kernel = harness.time_kernels(functions, 5)
    events = harness.time_interleaved(functions, 5)
    assert 1.5 < kernel["two"] / kernel["one"] < 2.5
    assert kernel["one"] < events["one"]


@pytest.mark.gpu
def test_a_function_that_looks_like_the_flush_is_refused():
    x = torch.zeros(1 << 20, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="flushes in the profile"):
        harness.time_kernels({"amax": x.amax}, 3)
