"""Which tile computes a GEMM fastest, from the problem alone. Pure Python: runs without a GPU.

``choose`` takes the candidate with the lowest estimated time. The estimate counts clock cycles of
one SM and has these terms, all for one k-block (128 of K) of one tile unless said otherwise:

==============  ===================================================================================
tensor cores    ``block_m * block_n / 32``: 4096 FP8 MACs a clock, at 95 % of issue. A wgmma whose N
                is below 64 waits for its A operand from shared memory instead.
promotion       0.25 (128x128 scales) or 0.5 (1x128) of the tensor time, plus 80 slots per warp;
                and one warpgroup alone must fit its own wgmma, promotion and waits.
loads           bytes of A and B from L2 at 46 B a clock; a multicast operand counts half; 5 % of
                it is added even where it is hidden.
latency         a ring of S stages covers 1500 clocks of memory latency with S - 1 k-blocks.
epilogue        the tile's output at 32 B a clock (accumulation moves it twice), plus 400.
waves           items over the SMs, rounded up; groups are assumed to end mid-tile on average.
memory          never faster than the operands and the output once through memory.
==============  ===================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

SHARED_MEMORY = 232448  # bytes a CTA can have on Hopper
MAX_GROUPS = 1024  # entries of the group table in shared memory
BLOCK_K = 128
_PANELS = 8 * 2048  # epilogue staging: 2 KB for each consumer warp
_MAX_STAGES = 12

_L2_BYTES_PER_CLOCK = 46.0  # per SM
_MEMORY_BYTES_PER_CLOCK = 2000.0  # whole chip: 3.0 TB/s at 1.5 GHz
_LATENCY = 1500.0
_LAUNCH = 2000.0


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
    overlap: bool = False  # two sets of partial sums: promotion overlaps the same warps' wgmma

    def _stage_bytes(self, block_scales: bool) -> int:
        scales_b = -(-self.block_n // 128 // 4) * 4 if block_scales else self.block_n
        operands = (self.block_m + self.block_n) * BLOCK_K
        return operands + (self.block_m + max(4, scales_b)) * 4 + 16  # 16: the two barriers

    def stages(self, block_scales: bool) -> int:
        """Pipeline depth: as many stages as fit beside staging and the group table."""
        free = SHARED_MEMORY - _PANELS - MAX_GROUPS * 4
        return min(_MAX_STAGES, free // self._stage_bytes(block_scales))

    def shared_memory(self, block_scales: bool) -> int:
        """Bytes of dynamic shared memory, as laid out in csrc/gemm.cuh."""
        stages = self.stages(block_scales) * self._stage_bytes(block_scales)
        return stages + _PANELS + MAX_GROUPS * 4


_WIDE = (Tile(128, 256), Tile(128, 256, 2, 1), Tile(128, 256, 1, 2))
_SQUARE = (Tile(128, 128), Tile(128, 128, 2, 1), Tile(128, 128, 1, 2))
_MEDIUM = (
    *(Tile(128, 192, *c, o) for c in ((1, 1), (2, 1), (1, 2)) for o in (False, True)),
    *(Tile(128, 128, *c, True) for c in ((1, 1), (2, 1))),
)
_SHORT = (Tile(64, 32), Tile(64, 64), Tile(64, 128), Tile(64, 256))


def candidates(grouping: Grouping) -> tuple[Tile, ...]:
    """Every tile that is shipped for a grouping."""
    if grouping == Grouping.K_GROUPED:
        return _WIDE + _SQUARE + (Tile(128, 192), Tile(128, 192, 2, 1))
    return _WIDE + _SQUARE if grouping == Grouping.K_GROUPED else _WIDE + _MEDIUM + _SQUARE + _SHORT


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
    k_blocks = _ceil(p.k / (p.groups if not block_scales else 1), BLOCK_K)
    group_n = t.block_n if t.block_m == 128 else t.block_n // 2
    wgmma_n = group_n if group_n <= 128 else group_n // 2
    tensor = t.block_m * t.block_n / 32
    starved = max(1.0, (0.5 + 32 / wgmma_n))
    promotion = tensor * (0.25 if block_scales else 0.5)
    warpgroup = tensor / 2 + promotion / 2 + 60 * (group_n // wgmma_n)
    loads = BLOCK_K * (t.block_m / t.cluster_n + t.block_n / t.cluster_m) / _L2_BYTES_PER_CLOCK
    latency = _LATENCY / (t.stages(block_scales) - 1)
    # Of two tiles bound by the tensor cores, the one that loads less draws less power.
    block = max(tensor * starved / 0.95, promotion + 160, warpgroup, loads, latency) + 0.05 * loads

    out_bytes = 2 if p.output == Output.BF16 else 4
    touched = out_bytes * (2 if p.output == Output.ADD else 1)
    epilogue = 400 + t.block_m * t.block_n * touched / 32
    items, _ = _items(p, t)
    waves = _ceil(items, num_sms // (t.cluster_m * t.cluster_n))

    outputs = p.groups if p.grouping in (Grouping.K_GROUPED, Grouping.MASKED) else 1
    weights = 1 if p.grouping in (Grouping.DENSE, Grouping.K_GROUPED) else p.groups
    rows = p.groups if p.grouping == Grouping.MASKED else 1
    unique = rows * p.m * p.k + weights * p.n * p.k + outputs * p.m * p.n * touched
    memory = unique / _MEMORY_BYTES_PER_CLOCK
    return max(memory, waves * (k_blocks * block + epilogue)) + _LAUNCH


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
