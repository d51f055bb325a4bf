"""Rewritten issue hints: nothing but hints changes, and the runs are as long as they should be."""

from __future__ import annotations

import re
import struct

import pytest

from fp8moe.kernels import gemm, gemm_swiglu, gemm_swiglu_backward, jit, sass
from fp8moe.kernels.heuristics import Grouping, Output, Tile
from tests.kernels.test_build import disassembly

SPECS = [
    gemm.spec(Grouping.M_GROUPED, Output.BF16, Tile(128, 256), 8),
    gemm.spec(Grouping.DENSE, Output.BF16, Tile(64, 64), 1),
    gemm.spec(Grouping.K_GROUPED, Output.ADD, Tile(128, 192), 8),
    gemm_swiglu.spec(True, 8),
    gemm_swiglu_backward.spec(True),
]
# (specification, promotion FFMAs of one k-block)
PROMOTIONS = [
    (SPECS[0], 128),
    (SPECS[2], 96),
    (gemm.spec(Grouping.K_GROUPED, Output.F32, Tile(128, 256), 8), 128),
    (gemm.spec(Grouping.K_GROUPED, Output.F32, Tile(192, 128), 8), 64),
    (SPECS[3], 128),
    (SPECS[4], 128),
]
_HEX = re.compile(r"/\* 0x[0-9a-f]{16} \*/")


@pytest.fixture(scope="module", params=SPECS, ids=str)
def cubins(request: pytest.FixtureRequest) -> tuple[bytes, bytes]:
    """As ptxas wrote it, and as it is shipped."""
    spec: jit.KernelSpec = request.param
    plain, _ = jit._nvrtc(jit.render(spec), spec.source, jit.OPTIONS)
    assert plain is not None
    return plain, jit.compile(spec).cubin


def _instructions(cubin: bytes) -> list[str]:
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", disassembly(cubin))
    assert len(found) > 500
    return found


def _runs(instructions: list[str]) -> list[list[bool]]:
    """Of neighbouring FFMAs with the same second operand: whether each holds it."""
    runs: list[list[bool]] = []
    before = None
    for text in instructions:
        match = re.match(r"FFMA (R\d+), R\d+(?:\.reuse)?, (R\d+)(\.reuse)?, R\d+", text)
        if match is None or match[1] == match[2]:
            before = None
            continue
        if match[2] != before:
            runs.append([])
        before = match[2]
        runs[-1].append(match[3] is not None)
    return runs


def test_only_hints_change(cubins: tuple[bytes, bytes]) -> None:
    plain, held = cubins
    assert len(plain) == len(held)
    before, after = _instructions(plain), _instructions(held)
    assert [t.replace(".reuse", "") for t in before] == [t.replace(".reuse", "") for t in after]
    # In the bytes: nothing outside the hints of FFMAs.
    hints = sass._REUSE_B | sass._NO_YIELD
    covered = set()
    for start, size in sass._code(plain):
        for at in range(start, start + size, 16):
            (low, high), (low_after, high_after) = (
                struct.unpack_from("<QQ", cubin, at) for cubin in cubins
            )
            assert low == low_after and high & ~hints == high_after & ~hints
            if high != high_after:
                assert sass._held(low) is not None
            covered.update(range(at, at + 16))
    assert all(a == b for i, (a, b) in enumerate(zip(plain, held, strict=True)) if i not in covered)


def test_operands_are_held_in_runs(cubins: tuple[bytes, bytes]) -> None:
    plain, held = cubins
    for run in _runs(_instructions(held)):
        # The last of a run, and every RUN-th, lets go.
        expected = [(i + 1) % sass.RUN != 0 and i + 1 < len(run) for i in range(len(run))]
        assert run == expected
    # The control: ptxas's own hints are not like that where there is something to hold.
    longest = max(map(len, _runs(_instructions(plain))))
    if longest >= sass.RUN:
        assert _runs(_instructions(plain)) != _runs(_instructions(held))


@pytest.mark.parametrize(("spec", "ffmas"), PROMOTIONS, ids=lambda p: str(p))
def test_promotions_have_long_runs(spec: jit.KernelSpec, ffmas: int) -> None:
    """What the promotion is written for, if ptxas puts the scale in operand B."""
    runs = _runs(_instructions(jit.compile(spec).cubin))
    assert sum(len(run) for run in runs if len(run) >= sass.RUN) >= 0.75 * ffmas


def test_a_destination_is_not_held() -> None:
    ffma = sass._FFMA | sass._ALWAYS << 12 | 5 << 16 | 6 << 24 | 7 << 32
    assert sass._held(ffma) == 7
    assert sass._held(ffma & ~(0xFF << 16) | 7 << 16) is None  # R7 = R6 * R7 + ...
    assert sass._held(ffma & ~(0xF << 12)) is None  # predicated
    assert sass._held(ffma ^ 1) is None  # another instruction


def test_what_ptxas_holds_is_not_yielded_away(cubins: tuple[bytes, bytes]) -> None:
    """Also where an FFMA lets go of operand B."""
    for cubin in cubins:
        for start, size in sass._code(cubin):
            for at in range(start, start + size, 16):
                _, high = struct.unpack_from("<QQ", cubin, at)
                assert not high & sass._REUSE or high & sass._NO_YIELD


@pytest.mark.parametrize("data", [b"", b"not an ELF file at all", b"\x7fELF\x01\x01"])
def test_refuses_what_is_no_cubin(data: bytes) -> None:
    with pytest.raises(ValueError, match="cubin: expected a 64-bit little-endian ELF file"):
        sass.hold_operands(data)
