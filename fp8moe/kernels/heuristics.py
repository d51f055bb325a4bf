"""Which tile computes a GEMM fastest, from the problem alone. Pure Python: runs without a GPU.

``choose`` takes the candidate with the lowest estimated time. The estimate counts clock cycles of
one SM:

    compute  =  waves * (k_blocks * block + epilogue)  -  epilogue
    time     =  (compute^3 + memory^3)^(1/3)  +  last epilogue  +  launch

==============  ===================================================================================
waves           tiles over the SMs, rounded up; groups are assumed to end mid-tile on average
block           cycles of a k-block: cost * block_m * block_n / 32, and `contention`. The cost is
                in cycles per cycle of the tensor cores at their peak (4096 MACs a clock):
                promotion, operand loads and waits are in it. Measured, see ``_COST``.
contention      SMs that read the same few lines wait for each other (so it looks: one row of A is
                slower than 64). In proportion to the SMs at work, the less the more rows A has
epilogue        cycles from the last product of a tile to the first of the next. Measured.
last epilogue   of the last wave. No next tile hides its stores: it counts twice
memory          the operands and the output once through memory. SMs do not leave a wave together,
                and those without a tile in the last one draw nothing: for each such empty place
                `_IDLE` of a tile's bytes more. SMs of a single wave share the whole bandwidth
cubes           the larger of compute and memory hides the smaller, the better the more they
                differ: 26 % are added if they are equal, 4 % if one is half the other
launch          prologue, pipeline fill, tail
splits          CTAs that share a tile: each has its part of the k-blocks and of the epilogue, and
                `_EXCHANGE` more cycles for adding the sums; they count as tiles in `waves`, for
                which clusters of more than two have three quarters of the SMs
==============  ===================================================================================

`_EXCHANGE` and the constants of 128x128 and of the tiles of 64 rows were fitted to 73 shapes of
``python -m benchmarks.gemm --search`` on an H100 (the forward families, 1 to 131072 rows): least
squares on the relative errors within a shape, those of fast tiles weighing more, with a penalty
where a tile is estimated less far behind the best than it is (up to 8 %) and a mild pull towards
the former values; then rounded. The other constants are from earlier fits. The clock was taken for
1.6 GHz throughout. It really moves between 1.4 and 1.75 GHz with the power that a shape draws, so
the times estimated for the best tiles are off by 8 % rms; but all tiles of a shape share its clock,
and no choice depends on `_LAUNCH`. On the shapes of the fit the choice is 0.2 % off the best tile
on average, at worst 1.1 % from 4096 rows up and 2.7 % below. A fit of the same form without one
shape chooses for that shape within 2.7 % but for one of the 73 (1 x 4096 x 7168: 7.1 %), 0.3 % on
average. With one of the fitted constants 5 % off no choice is more than 2.7 % off; with every
constant off by up to 5 % at random the average is 0.2 %. Weight gradients were not in the fit: the
same costs, with FP32's epilogue, are assumed for them.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

SHARED_MEMORY = 232448  # bytes a CTA can have on Hopper
MAX_GROUPS = 1024  # entries of the group table in shared memory
FEW_GROUPS = 128  # with no more groups than this, a shorter table leaves room for another stage
BLOCK_K = 128
_PANEL = 2048  # bytes of epilogue staging of a consumer warp
_MAX_STAGES = 12

_MEMORY_BYTES_PER_CLOCK = 1900.0  # whole chip: 3.0 TB/s at 1.6 GHz
_LAUNCH = 3100.0
_EXCHANGE = 4500.0
_LAST_EPILOGUE = 2.0  # epilogues between two tiles
_IDLE = 1 / 3  # of a tile's bytes
_CONTENTION = 80.0  # cycles of a k-block if all SMs read one row of A

# (cost, epilogue of a BF16 output) by block_m, block_n.
_COST = {
    (128, 256): (0.973, 2300.0),
    (128, 192): (0.983, 1950.0),
    (192, 128): (1.087, 1820.0),
    (128, 128): (1.20, 1200.0),
    (64, 256): (1.30, 900.0),
    (64, 128): (1.55, 600.0),
    (64, 64): (2.30, 500.0),
    (64, 32): (3.80, 700.0),
}
_FP32_OUTPUT = 2.0  # factor of the epilogue: twice the bytes; assumed


class Grouping(IntEnum):
    """Tile scheduling policies, numbered as in csrc/scheduler.cuh."""

    DENSE = 0
    M_GROUPED = 1
    MASKED = 2
    K_GROUPED = 3


class Output(IntEnum):
    """Epilogues, numbered as in csrc/scheduler.cuh."""

    BF16 = 0
    F32 = 1
    ADD = 2


class Problem(NamedTuple):
    """What is known on the host: ``m`` counts all rows of A (for masked: of one group)."""

    grouping: Grouping
    output: Output
    m: int
    n: int
    k: int
    groups: int = 1

    @property
    def rows_a(self) -> int:
        """Rows of A in memory, all groups below each other."""
        return self.m * (self.groups if self.grouping == Grouping.MASKED else 1)

    @property
    def rows_b(self) -> int:
        shared = self.grouping in (Grouping.DENSE, Grouping.K_GROUPED)
        return self.n * (1 if shared else self.groups)

    @property
    def rows_d(self) -> int:
        apart = self.grouping in (Grouping.MASKED, Grouping.K_GROUPED)
        return self.m * (self.groups if apart else 1)


def table_bytes(groups: int) -> int:
    """The group table in shared memory."""
    return 4 * (FEW_GROUPS if groups <= FEW_GROUPS else MAX_GROUPS)


class Tile(NamedTuple):
    """One compiled configuration: the rows and columns that a CTA computes at a time.

    ``splits`` CTAs, a cluster, compute a part of the contraction of a tile each.
    """

    block_m: int
    block_n: int
    splits: int = 1

    def __str__(self) -> str:
        split = f"/{self.splits}" if self.splits > 1 else ""
        return f"{self.block_m}x{self.block_n}{split}"

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        """What csrc/gemm.cuh is told of the tile."""
        return (
            ("BLOCK_M", self.block_m),
            ("BLOCK_N", self.block_n),
            ("SPLITS", self.splits),
        )

    @property
    def consumers(self) -> int:
        """Consumer warpgroups: 64 rows of the tile each, two sharing the columns of 64 rows."""
        return 3 if self.block_m == 192 else 2

    @property
    def async_store(self) -> bool:
        """Whether TMA writes the tile while the next one is computed, in panels of 128 bytes."""
        return self.block_n >= 128

    @property
    def stage_bytes(self) -> int:
        scales_b = -(-self.block_n // 128 // 4) * 4
        operands = (self.block_m + self.block_n) * BLOCK_K
        return operands + (self.block_m + scales_b) * 4 + 16  # 16: the two barriers

    def _other_bytes(self, groups: int) -> int:
        """Epilogue staging and the group table."""
        panels = 2 if self.async_store else 1
        return 4 * self.consumers * panels * _PANEL + table_bytes(groups)

    def stages(self, groups: int) -> int:
        """Pipeline depth: as many stages as fit beside staging and the group table."""
        free = SHARED_MEMORY - self._other_bytes(groups)
        return min(_MAX_STAGES, free // self.stage_bytes)

    def shared_memory(self, groups: int) -> int:
        """Bytes of dynamic shared memory, as laid out in csrc/gemm.cuh."""
        stages = self.stages(groups) * self.stage_bytes
        return stages + self._other_bytes(groups)


_LARGE = (Tile(128, 256), Tile(128, 192), Tile(128, 128), Tile(192, 128))
_SHORT = (Tile(64, 32), Tile(64, 64), Tile(64, 128), Tile(64, 256))
_SPLIT = (
    Tile(64, 32, 4),
    Tile(64, 64, 2),
    Tile(64, 64, 4),
    Tile(64, 64, 8),
    Tile(64, 128, 2),
    Tile(64, 128, 4),
)


def candidates(grouping: Grouping) -> tuple[Tile, ...]:
    """Every tile that is shipped for a grouping."""
    if grouping == Grouping.K_GROUPED:
        return _LARGE
    return _LARGE + _SHORT + (_SPLIT if grouping == Grouping.DENSE else ())


def _ceil(a: float, b: int) -> int:
    return int(-(-a // b))


def _tiles(p: Problem, t: Tile) -> tuple[float, int]:
    """Expected number of tiles, and of those along m of one group."""
    rows, columns = _ceil(p.m, t.block_m), _ceil(p.n, t.block_n)
    if p.grouping != Grouping.M_GROUPED:
        return rows * columns * (1 if p.grouping == Grouping.DENSE else p.groups), rows
    # Groups end in the middle of a tile on average; few rows are a tile of each group all the same.
    expected = p.m / t.block_m + (0.5 * p.groups if p.groups > 1 else 0.0)
    expected = max(expected, min(p.m, p.groups), 1.0)
    return expected * columns, max(1, _ceil(p.m / p.groups, t.block_m))


def max_tiles(p: Problem, t: Tile) -> int:
    """An upper bound of the tiles, whatever the groups turn out to be."""
    rows, columns = _ceil(p.m, t.block_m), _ceil(p.n, t.block_n)
    if p.grouping == Grouping.M_GROUPED:
        return (rows + p.groups - 1) * columns
    return rows * columns * (1 if p.grouping == Grouping.DENSE else p.groups)


def grid(p: Problem, t: Tile, num_sms: int) -> int:
    """CTAs to launch: one for each SM at most; of split tiles one for each part, however many."""
    tiles = max_tiles(p, t)
    return min(num_sms, tiles) if t.splits == 1 else tiles * t.splits


def estimate(p: Problem, t: Tile, num_sms: int) -> float:
    """Estimated clock cycles of problem ``p`` with tile ``t`` (see the module's table)."""
    k_blocks = _ceil(p.k / (p.groups if p.grouping == Grouping.K_GROUPED else 1), BLOCK_K)
    cost, epilogue = _COST[t.block_m, t.block_n]
    tiles, _ = _tiles(p, t)
    last_epilogue = _LAST_EPILOGUE * epilogue  # FP32's takes as long: assumed
    epilogue *= 1.0 if p.output == Output.BF16 else _FP32_OUTPUT
    if t.splits > 1:
        tiles *= t.splits
        k_blocks = _ceil(k_blocks, t.splits)
        epilogue = epilogue / t.splits + _EXCHANGE
        last_epilogue = last_epilogue / t.splits + _EXCHANGE
        # A cluster lies within one GPC, whose SMs may leave a rest: clusters of four that ask for
        # 128 of 132 SMs took two waves.
        num_sms = num_sms if t.splits == 2 else max(1, num_sms * 3 // 4)
    waves = _ceil(tiles, num_sms)

    contention = _CONTENTION * min(1.0, tiles / num_sms) / max(1, p.rows_a)
    block = cost * t.block_m * t.block_n / 32 + contention
    compute = waves * (k_blocks * block + epilogue) - epilogue

    touched = {Output.BF16: 2, Output.F32: 4, Output.ADD: 8}[p.output]
    unique = p.rows_a * p.k + p.rows_b * p.k + p.rows_d * p.n * touched
    empty = waves * num_sms / tiles - 1 if waves > 1 else 0.0  # places, per tile
    memory = unique / _MEMORY_BYTES_PER_CLOCK * (1 + _IDLE * empty)
    return math.cbrt(compute**3 + memory**3) + last_epilogue + _LAUNCH


def band(p: Problem, t: Tile, num_sms: int) -> int:
    """Tiles along m that are walked together: the fewest distinct bytes in one wave."""
    _, rows = _tiles(p, t)

    def wave_bytes(b: int) -> int:
        width = min(b, rows)
        return width * t.block_m + _ceil(num_sms, width) * t.block_n

    return min((1, 2, 4, 8, 16, 32), key=wave_bytes)


@lru_cache(maxsize=4096)
def m_grouped_walk(t: Tile, m: int, n: int, k: int, groups: int, num_sms: int) -> tuple[int, int]:
    """The band width and the grid of a problem whose tile is given."""
    p = Problem(Grouping.M_GROUPED, Output.BF16, m, n, k, groups)
    return band(p, t, num_sms), grid(p, t, num_sms)


@lru_cache(maxsize=4096)
def choose(p: Problem, num_sms: int) -> tuple[Tile, int]:
    """The tile with the lowest estimate, and the band width of its walk."""
    tile = min(candidates(p.grouping), key=lambda t: estimate(p, t, num_sms))
    return tile, band(p, tile, num_sms)
