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


PAIRS = [t for t in TILES if t.pair > 1]


def test_only_dense_problems_have_pairs_which_are_not_chosen():
    assert PAIRS
    for grouping in Grouping:
        assert any(t.pair > 1 for t in heuristics.candidates(grouping)) == (
            grouping == Grouping.DENSE
        )
    for m, n, k in ((4096, 512, 32768), (4096, 4096, 7168), (128, 7168, 16384), (1, 64, 128)):
        tile, _ = heuristics.choose(Problem(Grouping.DENSE, Output.BF16, m, n, k), 132)
        assert tile.pair == 1


def test_pairs_would_be_chosen_where_loads_from_l2_bound(monkeypatch):
    monkeypatch.setattr(heuristics, "_CHOOSE_PAIRS", True)
    for (m, n, k), pair in (((4096, 512, 32768), 2), ((4096, 4096, 7168), 1)):
        p = Problem(Grouping.DENSE, Output.BF16, m, n, k)
        tile, _ = heuristics.choose.__wrapped__(p, 132)
        assert tile.pair == pair


@pytest.mark.parametrize("tile", PAIRS, ids=str)
@pytest.mark.parametrize("sms", [1, 3, 78, 131, 132])
def test_both_ctas_of_every_pair_are_launched(tile, sms):
    for m in (1, 128, 129, 4096):
        for n in (8, 512, 7168):
            p = Problem(Grouping.DENSE, Output.BF16, m, n, 512)
            grid = heuristics.grid(p, tile, sms)
            assert grid % 2 == 0 and 2 <= grid <= max(2, sms)
            assert grid <= 2 * heuristics.max_tiles(p, tile)


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
