"""The choice of a tile needs no GPU: limits of the hardware, and the choices that matter."""

import pytest

from fp8moe.kernels import heuristics
from fp8moe.kernels.heuristics import Grouping, Output, Problem, Tile

TILES = sorted({t for g in Grouping for t in heuristics.candidates(g)}, key=str)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("groups", [1, heuristics.FEW_GROUPS, heuristics.MAX_GROUPS])
def test_every_tile_fits_shared_memory_with_a_working_ring(tile, groups):
    assert tile.shared_memory(groups) <= heuristics.SHARED_MEMORY
    assert 3 <= tile.stages(groups) <= 12


def test_a_short_group_table_leaves_room_for_a_fourth_stage():
    assert Tile(128, 256).stages(heuristics.FEW_GROUPS) == 4
    assert Tile(128, 256).stages(heuristics.FEW_GROUPS + 1) == 3


def test_large_problems_get_the_wide_tile_walked_in_bands():
    tile, band = heuristics.choose(Problem(Grouping.DENSE, Output.BF16, 4096, 4096, 7168), 132)
    assert (tile.block_m, tile.block_n) == (128, 256)
    assert band > 1


def test_a_narrower_tile_is_chosen_where_it_saves_a_wave():
    # 4096 x 2112 is 9 columns of 256 but 11 of 192: 3 waves either way, of shorter tiles.
    tile, _ = heuristics.choose(Problem(Grouping.DENSE, Output.BF16, 4096, 2112, 7168), 132)
    assert tile.block_n == 192


@pytest.mark.parametrize("m", [1, 7, 64])
def test_few_rows_get_the_short_tile(m):
    tile, _ = heuristics.choose(Problem(Grouping.DENSE, Output.BF16, m, 4096, 7168), 132)
    assert tile.block_m == 64


# Microseconds of the fastest tiles by (groups, rows of a group, N, K), from ``python -m
# benchmarks.gemm --search`` on an H100. One group: dense, else masked. With so few rows the memory
# bounds, or the tiles do not fill the SMs.
MEASURED = {
    (1, 1, 4096, 7168): {"64x64/2": 16.42, "64x128/2": 17.12, "64x32": 17.58, "64x64": 18.30},
    (1, 64, 4096, 7168): {"64x64": 14.38, "64x32": 14.77, "64x64/2": 15.18, "64x128/2": 15.95},
    (1, 128, 4096, 7168): {"64x64": 14.59, "64x128": 16.54, "64x128/2": 16.90, "128x128": 21.74},
    (1, 1, 2112, 7168): {"64x128/4": 10.96, "64x64": 13.38, "64x64/2": 13.42, "64x128/2": 13.71},
    (1, 128, 2112, 7168): {"64x64/2": 12.43, "64x32": 12.54, "64x64": 13.58, "64x128/2": 13.79},
    (1, 64, 576, 7168): {"64x32/4": 7.28, "64x64/8": 7.33, "64x64/4": 7.76, "64x128/4": 8.77},
    (1, 128, 576, 7168): {"64x64/4": 7.92, "64x128/4": 9.09, "64x64/2": 9.95, "64x128/2": 11.78},
    (1, 64, 24576, 1536): {"64x64": 16.11, "64x256": 16.30, "64x128": 16.83, "128x256": 17.86},
    (1, 128, 24576, 1536): {"64x128": 16.58, "128x192": 17.50, "128x256": 18.24, "128x128": 18.32},
    (1, 64, 32768, 512): {"64x256": 9.50, "64x128": 9.54, "64x64": 9.63, "128x128": 10.51},
    (1, 128, 32768, 512): {"64x256": 10.38, "128x128": 10.53, "64x128": 10.59, "128x256": 11.50},
    (1, 1, 7168, 16384): {"64x128/2": 43.89, "64x128/4": 47.97, "64x64": 49.47, "64x128": 51.06},
    (1, 128, 7168, 16384): {"64x128": 45.30, "128x128": 51.07, "64x64": 54.16, "64x256": 57.06},
    (1, 64, 7168, 2048): {"64x64": 8.38, "64x128": 8.78, "64x32": 9.71, "128x128": 9.98},
    (6, 20, 4096, 2048): {"64x256": 20.61, "64x64": 21.58, "64x128": 21.95, "128x192": 22.14},
    (6, 20, 6144, 7168): {"64x64": 98.16, "64x128": 101.87, "64x256": 103.95, "64x32": 113.55},
    (6, 20, 7168, 3072): {"64x128": 48.88, "128x192": 52.37, "64x64": 52.86, "64x256": 53.50},
    (32, 20, 4096, 2048): {"64x256": 94.03, "64x128": 95.52, "128x256": 96.58, "64x64": 97.57},
}


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_few_rows_get_a_tile_within_three_percent_of_the_fastest(shape):
    groups, *mnk = shape
    grouping = Grouping.DENSE if groups == 1 else Grouping.MASKED
    tile, _ = heuristics.choose(Problem(grouping, Output.BF16, *mnk, groups), 132)
    us = MEASURED[shape]
    assert us.get(str(tile), float("inf")) <= 1.03 * min(us.values())


def test_groups_of_few_rows_get_the_short_tile():
    # Each of 128 groups of 4 rows has a tile, however tall: a taller one saves none.
    p = Problem(Grouping.M_GROUPED, Output.BF16, 4 * 128, 4096, 7168, 128)
    tall, short = (heuristics._tiles(p, Tile(block_m, 128))[0] for block_m in (128, 64))
    assert tall == short == 128 * 4096 / 128
    tile, _ = heuristics.choose(p, 132)
    assert tile.block_m == 64


@pytest.mark.parametrize(("m", "n", "k"), [(1, 576, 7168), (128, 576, 7168), (64, 2112, 7168)])
def test_few_long_tiles_are_split_over_clusters_that_fit_in_one_wave(m, n, k):
    p = Problem(Grouping.DENSE, Output.BF16, m, n, k)
    tile, _ = heuristics.choose(p, 132)
    assert tile.splits > 1
    assert heuristics.grid(p, tile, 132) == heuristics.max_tiles(p, tile) * tile.splits <= 132


@pytest.mark.parametrize(("m", "n", "k"), [(4096, 4096, 7168), (64, 32768, 512), (512, 7168, 2048)])
def test_enough_tiles_or_a_short_contraction_are_not_split(m, n, k):
    p = Problem(Grouping.DENSE, Output.BF16, m, n, k)
    tile, _ = heuristics.choose(p, 132)
    assert tile.splits == 1
    assert heuristics.grid(p, tile, 132) <= 132


@pytest.mark.parametrize("sms", [1, 2, 78, 114, 132])
@pytest.mark.parametrize("k", [16, 256, 1024, 65536])
def test_every_part_of_a_chosen_tile_has_something_to_contract(k, sms):
    for m in (1, 64, 4096):
        for n in (64, 576, 7168):
            p = Problem(Grouping.DENSE, Output.BF16, m, n, k)
            tile, _ = heuristics.choose(p, sms)
            assert tile.splits <= -(-k // 128)
            assert heuristics.grid(p, tile, sms) % tile.splits == 0


def test_only_dense_problems_are_split():
    for grouping in Grouping:
        split = any(t.splits > 1 for t in heuristics.candidates(grouping))
        assert split == (grouping == Grouping.DENSE)


@pytest.mark.parametrize("grouping", list(Grouping))
def test_estimate_grows_with_the_work(grouping):
    small = Problem(grouping, Output.BF16, 4096, 2048, 4096, 4)
    for field in ("m", "n", "k"):
        large = small._replace(**{field: 4 * getattr(small, field)})
        for tile in heuristics.candidates(grouping):
            assert heuristics.estimate(large, tile, 132) > heuristics.estimate(small, tile, 132)


def test_max_tiles_bounds_every_split_of_the_rows():
    tile = Tile(128, 256)
    p = Problem(Grouping.M_GROUPED, Output.BF16, 1000, 512, 512, 5)
    for sizes in ([1000, 0, 0, 0, 0], [1, 1, 1, 1, 996], [200] * 5, [129, 1, 385, 257, 228]):
        rows = sum(-(-s // 128) for s in sizes)
        assert rows * 2 <= heuristics.max_tiles(p, tile)


def test_accumulation_costs_more_than_overwriting():
    add = Problem(Grouping.K_GROUPED, Output.ADD, 1536, 2048, 8192, 128)
    write = Problem(Grouping.K_GROUPED, Output.BF16, 1536, 2048, 8192, 128)
    tile = Tile(128, 256)
    assert heuristics.estimate(add, tile, 132) > heuristics.estimate(write, tile, 132)
