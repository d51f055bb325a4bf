"""The cost of expert parallelism on paper: its expectations against draws, its bytes by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import cluster
from benchmarks.cluster import LAYER, Measured, gradient_mb, layer_cost, main, met, tables

MEASURED = Measured(compute_ms=10.0, nvlink=300.0, network=50.0)


@pytest.mark.parametrize(("parts", "experts"), [(8, 256), (64, 256), (4, 64)])
def test_parts_that_a_token_meets(parts: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(20000, experts, generator=generator).topk(8, dim=1).indices
    hit = torch.zeros(len(chosen), parts).scatter_(1, chosen // (experts // parts), 1.0)
    found = float(hit.sum(dim=1).mean())
    assert met(parts, 8, experts) == pytest.approx(found, rel=5e-3)
    assert met(parts, 7, experts) != pytest.approx(found, rel=5e-3)  # negative control


def test_one_host_uses_no_network() -> None:
    cost = layer_cost(LAYER, 8, 1, "once per rank", MEASURED)
    assert cost.network_mb == 0 and cost.hosts == 1
    # 4096 tokens, each to met ranks of which 7 in 8 are others: x, dy, routing; y and dx.
    copy = 2 * (7168 + 56 * 4) + 8 * 8 + 2 * 2 * 7168
    assert cost.nvlink_mb == pytest.approx(4096 * met(8, 8, 256) * 7 / 8 * copy / 1e6)
    assert cost.comm_ms == pytest.approx(cost.nvlink_mb / 300)
    assert cost.exposed == pytest.approx(10 / (10 + cost.comm_ms)) and cost.hidden == 1


def test_what_brings_the_network_down() -> None:
    plain = layer_cost(LAYER, 64, 8, "once per rank", MEASURED)
    limited = layer_cost(LAYER, 64, 4, "once per rank", MEASURED)
    both = layer_cost(LAYER, 64, 4, "once per host", MEASURED)
    assert both.network_mb < 0.5 * limited.network_mb < limited.network_mb < plain.network_mb
    assert both.network_mb / limited.network_mb == pytest.approx(both.hosts / both.ranks)
    # The slower of the two links decides.
    slow_nvlink = Measured(10.0, 20.0, 50.0)
    got = layer_cost(LAYER, 64, 4, "once per host", slow_nvlink)
    assert got.comm_ms == pytest.approx(got.nvlink_mb / 20) and got.comm_ms > both.comm_ms
    assert got.hidden == pytest.approx(10 / got.comm_ms)


def test_gradients_of_replicas() -> None:
    assert gradient_mb(LAYER, 64, 64) == 0
    # 4 local experts of 3 x 7168 x 2048 weights in BF16; a ring of 2 sends each byte once.
    assert gradient_mb(LAYER, 128, 64) == pytest.approx(4 * 3 * 7168 * 2048 * 2 / 1e6)
    assert gradient_mb(LAYER, 2048, 256) < gradient_mb(LAYER, 2048, 64) / 4


def test_tables_follow_the_figures() -> None:
    assert tables(MEASURED) != tables(MEASURED._replace(network=40.0))
    assert tables(MEASURED) != tables(MEASURED._replace(nvlink=200.0))
    rows = [line.split("|") for line in tables(MEASURED).splitlines() if line]
    assert {len(row) for row in rows} == {7, 12}


def test_the_page_has_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "expert_parallel.md").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"^    python -m benchmarks.cluster (.*)$", page, re.MULTILINE)
    assert f"python -m benchmarks.cluster {arguments}\n" in str(cluster.__doc__)
    main(arguments.split())
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page


def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for ep in (4, 12, 512):
        with pytest.raises(ValueError, match=f"ep: expected a multiple of 8 that .* got {ep}"):
            layer_cost(LAYER, ep, 1, "once per rank", MEASURED)
    with pytest.raises(ValueError, match="transport: expected one of .* got 'by post'"):
        layer_cost(LAYER, 64, 1, "by post", MEASURED)
    with pytest.raises(SystemExit):
        main(["--compute-ms", "1", "--nvlink", "0", "--network", "1"])
    assert "--nvlink: expected more than 0, got 0.0" in capsys.readouterr().err
