"""Which tile computes a GEMM fastest, from the problem alone. Pure Python: runs without a GPU.

``choose`` takes the candidate with the lowest estimated time. The estimate counts clock cycles of
one SM:

    waves * (k_blocks * cost * block_m * block_n / 32  +  epilogue)  +  launch

==============  ===================================================================================
waves           work items over the SMs, rounded up; groups are assumed to end mid-tile on average
cost            cycles per cycle of the tensor cores at their peak (4096 MACs a clock): promotion,
                operand loads and waits are in it. Measured, see ``_COST``.
epilogue        cycles from the last product of a tile to the first of the next. Measured.
launch          prologue, pipeline fill, tail
memory          the operands and the output once through memory; the smaller of this and the
                above is hidden to 70 %
==============  ===================================================================================

``_COST`` was fitted (least squares on relative error, 3 to 4 % rms) to
``python -m benchmarks.gemm --search`` on an H200 at 1.6 GHz, which redoes the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

SHARED_MEMORY = 232448  # bytes a CTA can have on Hopper
MAX_GROUPS = 1024  # entries of the group table in shared memory
BLOCK_K = 128
_PANEL = 2048  # bytes of epilogue staging of a consumer warp
_MAX_STAGES = 12

_MEMORY_BYTES_PER_CLOCK = 2000.0  # whole chip: 3.0 TB/s at 1.5 GHz
_LAUNCH = 3000.0

# (cost, epilogue) by block scales of B, block_m, block_n.
_COST = {
    (True, 128, 256): (1.26, 2200.0),
    (True, 128, 192): (1.295, 1850.0),
    (True, 128, 128): (1.43, 850.0),
    (True, 192, 128): (1.31, 1400.0),
    (True, 64, 256): (1.42, 1050.0),
    (True, 64, 128): (2.05, 700.0),
    (True, 64, 64): (3.1, 750.0),
    (True, 64, 32): (5.0, 600.0),
    (False, 128, 256): (1.81, 4600.0),
    (False, 192, 128): (1.75, 2650.0),
    (False, 128, 128): (2.2, 2250.0),
}
_ACCUMULATE = 1.5  # adding to FP32 in memory instead of overwriting it: epilogue factor, assumed
_A_REGISTERS = 1.045  # cost factor of taking A through registers: slower, only searched
_PAIR = 1.002  # a multicast pair loads less from L2 and waits more: level so far, so it breaks ties


class Grouping(IntEnum):
    """Tile scheduling policies, numbered as in csrc/scheduler.cuh."""

    DENSE = 0
    M_GROUPED = 1
    MASKED = 2
    K_GROUPED = 3


class Output(IntEnum):
    """Epilogues, numbered as in csrc/epilogue.cuh."""

    BF16 = 0
    F32 = 1
    ADD = 2


@dataclass(frozen=True)
class Problem:
    """What is known on the host: ``m`` counts all rows of A (for masked: of one group)."""

    grouping: Grouping
    output: Output
    m: int
    n: int
    k: int
    groups: int = 1


@dataclass(frozen=True)
class Tile:
    """One compiled configuration: CTA tile and cluster shape."""

    block_m: int
    block_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    a_registers: bool = False  # A goes through registers, so the two halves of a tile read it once

    @property
    def consumers(self) -> int:
        """Consumer warpgroups: 64 rows of the tile each, two sharing the columns of 64 rows."""
        return 3 if self.block_m == 192 else 2

    def overlap(self, block_scales: bool) -> bool:
        """Whether two sets of partial sums fit, so that a warpgroup multiplies as it promotes."""
        return block_scales and self.block_m == 128 and self.block_n <= 192

    def async_store(self, block_scales: bool) -> bool:
        """Whether the tile is staged whole, for TMA to write during the next one.

        A panel of TMA is 64 columns wide. The weight gradient keeps the shared memory for stages:
        its FP32 tiles would not fit anyway.
        """
        return block_scales and self.block_n >= 128

    def _stage_bytes(self, block_scales: bool) -> int:
        scales_b = -(-self.block_n // 128 // 4) * 4 if block_scales else self.block_n
        operands = (self.block_m + self.block_n) * BLOCK_K
        return operands + (self.block_m + max(4, scales_b)) * 4 + 16  # 16: the two barriers

    def _staging_bytes(self, block_scales: bool) -> int:
        if self.async_store(block_scales):
            return self.block_m * self.block_n * 2
        return 4 * self.consumers * _PANEL

    def stages(self, block_scales: bool) -> int:
        """Pipeline depth: as many stages as fit beside staging and the group table."""
        free = SHARED_MEMORY - self._staging_bytes(block_scales) - MAX_GROUPS * 4
        return min(_MAX_STAGES, free // self._stage_bytes(block_scales))

    def shared_memory(self, block_scales: bool) -> int:
        """Bytes of dynamic shared memory, as laid out in csrc/gemm.cuh."""
        stages = self.stages(block_scales) * self._stage_bytes(block_scales)
        return stages + self._staging_bytes(block_scales) + MAX_GROUPS * 4


_WIDE = tuple(Tile(128, 256, c, 1, r) for r in (False, True) for c in (1, 2))
_MEDIUM = (Tile(128, 192), Tile(128, 192, 2, 1), Tile(128, 192, 1, 2))
_SQUARE = (Tile(128, 128), Tile(128, 128, 2, 1))
_TALL = (Tile(192, 128), Tile(192, 128, 1, 2))
_SHORT = (Tile(64, 32), Tile(64, 64), Tile(64, 128), Tile(64, 256))


def candidates(grouping: Grouping) -> tuple[Tile, ...]:
    """Every tile that is shipped for a grouping."""
    if grouping == Grouping.K_GROUPED:
        return _WIDE + _SQUARE + _TALL
    return _WIDE + _MEDIUM + _SQUARE + _TALL + _SHORT


def _ceil(a: float, b: int) -> int:
    return int(-(-a // b))


def _items(p: Problem, t: Tile) -> tuple[float, int]:
    """Work items (tiles, or cluster pairs of tiles), and those along m of one group."""
    item_m, item_n = t.block_m * t.cluster_m, t.block_n * t.cluster_n
    columns = _ceil(p.n, item_n)
    if p.grouping in (Grouping.DENSE, Grouping.K_GROUPED):
        rows = _ceil(p.m, item_m)
        return rows * columns * (p.groups if p.grouping == Grouping.K_GROUPED else 1), rows
    if p.grouping == Grouping.MASKED:
        rows = _ceil(p.m, item_m)
        return rows * columns * p.groups, rows
    mean = p.m / p.groups
    rows_total = p.m / item_m + (0.5 * p.groups if p.groups > 1 else 0.0)
    return max(rows_total, 1.0) * columns, max(1, _ceil(mean, item_m))


def max_items(p: Problem, t: Tile) -> int:
    """An upper bound of the work items, whatever the groups turn out to be."""
    columns = _ceil(p.n, t.block_n * t.cluster_n)
    rows = _ceil(p.m, t.block_m * t.cluster_m)
    if p.grouping == Grouping.M_GROUPED:
        return (rows + p.groups - 1) * columns
    return rows * columns * (1 if p.grouping == Grouping.DENSE else p.groups)


def estimate(p: Problem, t: Tile, num_sms: int) -> float:
    """Estimated clock cycles of problem ``p`` with tile ``t`` (see the module's table)."""
    block_scales = p.grouping != Grouping.K_GROUPED
    k_blocks = _ceil(p.k / (1 if block_scales else p.groups), BLOCK_K)
    cost, epilogue = _COST[block_scales, t.block_m, t.block_n]
    cluster = t.cluster_m * t.cluster_n
    items, _ = _items(p, t)
    waves = _ceil(items, num_sms // cluster)
    block = cost * t.block_m * t.block_n / 32 * (_PAIR if cluster == 2 else 1.0)
    block *= _A_REGISTERS if t.a_registers else 1.0
    epilogue *= _ACCUMULATE if p.output == Output.ADD else 1.0

    touched = {Output.BF16: 2, Output.F32: 4, Output.ADD: 8}[p.output]
    outputs = p.groups if p.grouping in (Grouping.K_GROUPED, Grouping.MASKED) else 1
    weights = 1 if p.grouping in (Grouping.DENSE, Grouping.K_GROUPED) else p.groups
    rows = p.groups if p.grouping == Grouping.MASKED else 1
    unique = rows * p.m * p.k + weights * p.n * p.k + outputs * p.m * p.n * touched
    memory = unique / _MEMORY_BYTES_PER_CLOCK
    compute = waves * (k_blocks * block + epilogue)
    return max(memory, compute) + 0.3 * min(memory, compute) + _LAUNCH


def band(p: Problem, t: Tile, num_sms: int) -> int:
    """Items along m that are walked together: the fewest distinct bytes of A and B in one wave."""
    _, rows = _items(p, t)
    slots = num_sms // (t.cluster_m * t.cluster_n)

    def wave_bytes(b: int) -> int:
        width = min(b, rows)
        return width * t.block_m * t.cluster_m + _ceil(slots, width) * t.block_n * t.cluster_n

    return min((1, 2, 4, 8, 16, 32), key=wave_bytes)


@lru_cache(maxsize=4096)
def choose(p: Problem, num_sms: int) -> tuple[Tile, int]:
    """The tile with the lowest estimate, and the band width of its walk."""
    tile = min(candidates(p.grouping), key=lambda t: estimate(p, t, num_sms))
    return tile, band(p, tile, num_sms)
