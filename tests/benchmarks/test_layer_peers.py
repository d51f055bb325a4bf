"""Peers of the layer benchmark: stand-ins for their libraries, and ours beside them."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from benchmarks.layer import __main__ as command
from benchmarks.layer import peers
from benchmarks.layer.contenders import BASELINE, step, torch_bf16
from benchmarks.layer.workload import Shape, make_inputs

SHAPE = Shape(tokens=96, topk=2, experts=4, hidden=256, intermediate=128)
CPU = torch.device("cpu")


def test_the_padded_layer_of_a_peer_computes_the_layer():
    def grouped_mm(rows, w, *, offs, pad_token_groups_for_grouped_mm):
        assert (offs % 16 == 0).all() and not pad_token_groups_for_grouped_mm
        return torch.nn.functional.grouped_mm(rows, w, offs=offs)

    inputs = make_inputs(SHAPE, CPU, "zipf")
    padded = step(peers.padded_layer(grouped_mm, 16), inputs)()
    for a, b in zip(padded, step(torch_bf16, inputs)(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


class _GroupedLinear(torch.nn.Module):
    """The interface of TransformerEngine's layer: its own parameters, sizes on the host."""

    def __init__(self, num_gemms, in_features, out_features, *, bias, params_dtype):
        super().__init__()
        assert not bias
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            empty = torch.full((out_features, in_features), torch.nan, dtype=params_dtype)
            self.register_parameter(f"weight{i}", torch.nn.Parameter(empty))

    def forward(self, rows, m_splits):
        assert all(type(m) is int and m % 16 == 0 for m in m_splits)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        parts = zip(rows.split(m_splits), weights, strict=True)
        return torch.cat([part @ w.t() for part, w in parts])


def test_transformer_engine_gets_the_weights_of_the_layer(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def fp8_autocast(enabled, fp8_recipe):
        entered.append((enabled, fp8_recipe))
        yield

    te = types.SimpleNamespace(GroupedLinear=_GroupedLinear, fp8_autocast=fp8_autocast)
    recipe = types.SimpleNamespace(Float8BlockScaling=lambda: "blocks")
    modules = {"transformer_engine.pytorch": te, "transformer_engine.common.recipe": recipe}
    monkeypatch.setattr(peers.importlib, "import_module", modules.__getitem__)
    inputs = make_inputs(SHAPE, CPU, "zipf")
    results = step(peers.load("transformer engine fp8"), inputs)()
    for a, b in zip(results, step(torch_bf16, inputs)(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert entered == [(True, "blocks")] * 2


def test_a_peer_that_fails_does_not_take_the_others_along(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setitem(peers.PEERS, "sonicmoe", lambda: broken)
    with pytest.raises(SystemExit, match="failed: time of 96,2,4,256,128 with peers$"):
        command.main(
            ["--device", "cpu", "--shape", "96,2,4,256,128", "--quick", "--parts", "time"]
            + ["--peers", "sonicmoe"]
        )
    captured = capsys.readouterr()
    assert "planted" in captured.err and "sonicmoe" not in captured.out
    assert BASELINE in captured.out and "fp8moe recompute" in captured.out


def test_a_peer_is_measured_with_the_others(monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "sonicmoe", lambda: torch_bf16)
    shape = ["--device", "cpu", "--shape", "96,2,4,256,128", "--quick"]
    rows = command.main([*shape, "--parts", "time", "small", "--peers", "sonicmoe"])
    found = [row["part"] for row in rows if row["layer"] == "sonicmoe"]
    assert found == ["time", "small"]


def test_a_peer_that_is_missing_says_so(monkeypatch, capsys):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    for name in peers.PEERS:
        with pytest.raises(RuntimeError, match=f"peer {name}: expected its library"):
            peers.load(name)
    with pytest.raises(SystemExit, match="2"):
        command.parse(["--device", "cpu", "--peers", "sonicmoe"])
    assert "peer sonicmoe: expected its library" in capsys.readouterr().err
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: object())
    with pytest.raises(RuntimeError, match="peer transformer engine fp8: .*Float8BlockScaling"):
        peers.load("transformer engine fp8")
