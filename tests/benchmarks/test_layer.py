"""The layer benchmark, on tiny layers: everything but the times means the same on a CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.layer import __main__ as command
from benchmarks.layer import fusion, host, parts, plot, traffic
from benchmarks.layer.contenders import BASELINE, CONTENDERS, FP8MOE, step
from benchmarks.layer.memory import peak_bytes, saved_bytes
from benchmarks.layer.workload import ROUTINGS, Shape, make_inputs, parse_shape, route
from fp8moe import testing
from fp8moe.kernels import (
    cast,
    cast_permute,
    gather,
    gemm,
    gemm_swiglu,
    gemm_swiglu_backward,
    permute,
    swiglu,
)
from fp8moe.kernels.fp8tensor import padded_capacity

SHAPE = Shape(tokens=96, topk=2, experts=4, hidden=256, intermediate=128)
CPU = torch.device("cpu")


def exact(inputs) -> list[torch.Tensor]:
    """y and the gradients in FP64."""
    x, probs, w13, w2 = (t.detach().double().requires_grad_() for t in inputs.leaves)
    y = torch.zeros_like(x)
    for e in range(w13.shape[0]):
        token, k = (inputs.ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ w13[e].t()).chunk(2, dim=1)
        rows = probs[token, k, None] * (torch.nn.functional.silu(gate) * up) @ w2[e].t()
        y = y.index_add(0, token, rows)
    return [y.detach(), *torch.autograd.grad(y, (x, probs, w13, w2), inputs.dy.double())]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_computes_the_layer(device, name, routing):
    inputs = make_inputs(SHAPE, device, routing)
    layer = CONTENDERS[name]
    with torch.no_grad():
        y = layer(inputs.x, inputs.ids, inputs.probs, inputs.w13, inputs.w2)
    results = [y, *step(layer, inputs)()]
    gate = 40.0 if name == BASELINE else 20.0
    db = [testing.sqnr_db(a, b) for a, b in zip(results, exact(inputs), strict=True)]
    assert min(db) > gate, db


def test_routings_have_the_load_they_promise():
    shape = Shape(4096, 4, 16, 128, 128)
    counts = {r: torch.bincount(route(shape, r, CPU).flatten(), minlength=16) for r in ROUTINGS}
    assert all(int(c.sum()) == 4096 * 4 for c in counts.values())
    assert counts["balanced"].max() < 1.2 * counts["balanced"].min()
    assert counts["half"][0] == 2 * 4096
    assert counts["zipf"][0] > 3 * counts["zipf"][15]
    assert not counts["empty"][8:].any() and counts["empty"][:8].all()
    with pytest.raises(ValueError, match="routing: expected .* got 'nothing'"):
        route(shape, "nothing", CPU)
    with pytest.raises(ValueError, match="at least 8 experts, got 6"):
        route(shape._replace(experts=6), "empty", CPU)


def test_shapes_by_name_and_by_size():
    assert parse_shape("qwen3")[1] == Shape(16384, 8, 128, 2048, 768)
    assert parse_shape("1,2,3,4,5")[1] == Shape(1, 2, 3, 4, 5)
    for wrong in ("qwen", "1,2,3", "1,2,3,4,0"):
        with pytest.raises(ValueError, match="shape: expected"):
            parse_shape(wrong)


def test_saved_bytes_counts_what_a_forward_adds():
    x = torch.randn(100, 100, requires_grad=True)
    w = torch.randn(100, 100, requires_grad=True)
    # x @ w saves its inputs; the sigmoid its output.
    assert saved_bytes(lambda: (x @ w).sigmoid()) == 40_000
    assert saved_bytes(lambda: (x @ w).sigmoid().sigmoid()) == 80_000
    assert saved_bytes(lambda: x @ w) == 0


def test_saved_bytes_of_the_layer_are_its_activations():
    inputs = make_inputs(SHAPE, CPU)
    rows = padded_capacity(192, 4)
    expected = {
        "fp8moe bf16": rows * 2 * 128 * 2,
        "fp8moe fp8": rows * 2 * 128 * (1 + 4 / 128),
        "fp8moe recompute": 0,
    }
    for name, h in expected.items():
        layer = CONTENDERS[name]
        found = saved_bytes(
            lambda layer=layer: layer(inputs.x, inputs.ids, inputs.probs, inputs.w13, inputs.w2)
        )
        maps = 4 * (192 + rows + 4)
        assert found == h + maps, name


def test_operators_of_many_experts_a_token_are_known():
    inputs = make_inputs(SHAPE._replace(topk=8, experts=16), CPU)
    calls = traffic.calls_of(step(FP8MOE["fp8moe fp8"], inputs), inputs.ids, 16)
    assert {"cast_per_token", "permute_fp8_to_channel"} <= {c.label for c in calls}


def test_a_compiled_layer_stays_compiled_when_its_operators_are_recorded():
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    layer = torch.compile(lambda x: torch.nn.functional.silu(x) * x, backend=backend)
    x = torch.randn(8, 16)
    traffic.calls_of(lambda: layer(x), torch.zeros(8, 1, dtype=torch.int64), 1)
    layer(torch.randn(8, 16, 4))  # would be left as it is
    assert len(compilations) == 2


@pytest.mark.parametrize("name", FP8MOE)
def test_recorded_operators_and_their_bytes(name):
    inputs = make_inputs(SHAPE, CPU)
    calls = traffic.calls_of(step(FP8MOE[name], inputs), inputs.ids, SHAPE.experts)
    gemms = [c for c in calls if c.flops]
    recomputed = 4.0 * 192 * 256 * 128 if name.endswith("recompute") else 0.0
    assert sum(c.flops for c in gemms) == inputs.flops + recomputed
    counts = torch.bincount(inputs.ids.flatten(), minlength=4)
    used = int(((counts + 127) // 128 * 128).sum())
    by_label = {c.label: c.bytes for c in calls}
    assert by_label["gather_sum"] == 192 * 256 * 2 + 192 * 4 + 96 * 256 * 2
    gradient, activation = 1 + 4 / 128, 1 + 4 / 128**2  # bytes an element, with its scale
    assert by_label["k_grouped_gemm 256 x 256"] == (
        used * 256 * (gradient + activation) + 4 * 4 + 4 * 256 * 256 * 2
    )


def test_every_kernel_of_the_table_exists():
    modules = (cast, cast_permute, gather, gemm, gemm_swiglu, gemm_swiglu_backward, permute, swiglu)
    entries = {s.entry for m in modules for s in m.kernel_specs()}
    for names in traffic.KERNELS.values():
        assert set(names) <= entries


def test_kernel_times_are_added_up_by_operator():
    calls = [
        traffic.Call("route", 10, 0.0, ("count", "place")),
        traffic.Call("gemm a", 20, 5.0, ("gemm",)),
        traffic.Call("gemm a", 20, 5.0, ("gemm",)),
    ]
    times = [("memset", 1.0), ("count", 2.0), ("place", 3.0), ("gemm", 4.0), ("memset", 1.0)]
    rows = traffic.by_operator(calls, [*times, ("gemm", 6.0)])
    assert rows == [
        traffic.Row("memset", 2, 2.0),
        traffic.Row("route", 2, 5.0, 10),
        traffic.Row("gemm a", 2, 10.0, 40, 10.0),
    ]
    with pytest.raises(RuntimeError, match="expected gemm of gemm a"):
        traffic.by_operator(calls, times)


def test_an_unknown_operator_is_not_passed_over():
    x = torch.randn(4, 128).bfloat16()
    ends = torch.tensor([4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="KERNELS: expected .* cast_per_channel"):
        traffic.calls_of(lambda: cast.cast_per_channel(x, ends, True, False), ends, 5)


def test_profile_names_the_functions_of_the_backward_pass_too():
    text = host.profile(step(FP8MOE["fp8moe fp8"], make_inputs(SHAPE, CPU)), 2, 400)
    assert "(backward_rows)" in text and "(swiglu_experts)" in text


def test_command_prints_and_appends_every_part(tmp_path, capsys):
    file = tmp_path / "results" / "layer.jsonl"
    rows = command.main(
        ["--device", "cpu", "--shape", "96,2,4,256,128", "--quick", "--json", str(file)]
    )
    text = capsys.readouterr().out
    for part in command.PARTS:
        assert f"{part}, 96,2,4,256,128" in text
        assert any(row["part"] == part for row in rows)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(rows)
    time = {line["layer"]: line for line in lines if line["part"] == "time"}
    assert set(time) == set(CONTENDERS) and time[BASELINE]["x baseline"] == 1.0
    assert all(line["gpu"] for line in lines)


FUSIONS = [
    (fusion.fusion_part, fusion.FUSED),
    (fusion.fusion_backward_part, fusion.BACKWARD_FUSED),
]


@pytest.mark.parametrize(("part", "fused"), FUSIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_fusion_compares_the_same_results(part, fused):
    rows = part(SHAPE._replace(tokens=600), parts.QUICK, CPU)
    assert [(r["tokens"], r["op"]) for r in rows[3::4]] == [(n, fused) for n in (600, 512)]
    assert all(r["same bits"] and r["x apart"] > 0 for r in rows[3::4])


@pytest.mark.parametrize(("part", "fused"), FUSIONS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("which", [0, -1])
def test_fusion_notices_other_results(part, fused, which, monkeypatch):
    right = getattr(fusion, fused)
    calls = []

    def wrong(*args):
        results = right(*args)
        calls.append(fused)
        results[which][0, 0] = float("nan")
        return results

    monkeypatch.setattr(fusion, fused, wrong)
    rows = part(SHAPE, parts.QUICK, CPU)
    assert calls and rows[-1]["same bits"] is False


def test_a_part_that_fails_does_not_take_the_others_along(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(command.parts, "kernels_part", broken)
    with pytest.raises(SystemExit, match="failed: kernels of 96,2,4,256,128"):
        command.main(
            ["--device", "cpu", "--shape", "96,2,4,256,128", "--quick"]
            + ["--parts", "kernels", "weights"]
        )
    captured = capsys.readouterr()
    assert "planted" in captured.err and "cast w13 and w2" in captured.out


def test_fresh_leaves_share_values_but_not_their_graph():
    inputs = make_inputs(SHAPE, CPU)
    fresh = inputs.with_fresh_leaves()
    for old, new in zip(inputs.leaves, fresh.leaves, strict=True):
        assert new is not old and new.is_leaf and new.requires_grad
        assert new.data_ptr() == old.data_ptr()


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "nothing"], ["--device", "cpu", "--plot", "a.png"], ["--parts", "nothing"]],
)
def test_command_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "expected" in error or "invalid choice" in error


def test_sums_of_a_step():
    rows = [
        traffic.Row("gemm a", 1, 10.0, 40, 3e7),
        traffic.Row("gemm b", 1, 20.0, 40, 3e7),
        traffic.Row("cast", 2, 5.0, 100),
        traffic.Row("memset", 3, 7.0),
        traffic.Row("between kernels", 0, 1.0),
    ]
    assert parts._together(rows, 40.0) == [
        {"op": "our GEMMs", "launches": 2, "sum us": 30.0, "TFLOP/s": 2.0},
        {"op": "our others", "launches": 2, "MB": 1e-4, "sum us": 5.0, "% of copy": 50.0},
    ]


CLASSES = {
    "route": "permute",
    "cast_permute": "permute",
    "cast_permute_both": "permute",
    "permute_fp8_to_channel": "permute",
    "cast_per_token": "cast",
    "cast_per_block_both": "cast",
    "transpose_per_block": "cast",
    "swiglu_cast": "SwiGLU",
    "gather_sum": "combine",
    "gather_slots": "combine",
    "m_grouped_gemm_swiglu N=1536 K=2048": "GEMM",
    "k_grouped_gemm 2048 x 768": "GEMM",
    "between kernels": "between kernels",
    "void at::native::vectorized_gather_kernel<16, long>": "other",
}


@pytest.mark.parametrize("op", CLASSES)
def test_classes_of_the_plot(op):
    assert plot.class_of(op) == CLASSES[op]
    assert "other" not in map(plot.class_of, traffic.KERNELS)


def test_plot_draws_a_bar_for_each_layer(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"part": "kernels", "shape": "a", "layer": "fp8moe fp8", "op": "swiglu_cast", "us": 100.0},
        {"part": "kernels", "shape": "a", "layer": "fp8moe fp8", "op": "gemm x", "us": 900.0},
        {"part": "kernels", "shape": "a", "layer": "torch bf16", "op": "index", "us": 2000.0},
        {"part": "time", "shape": "a", "layer": "torch bf16"},
    ]
    assert plot.totals(rows) == {
        ("a", "fp8moe fp8"): {"SwiGLU": 0.1, "GEMM": 0.9},
        ("a", "torch bf16"): {"other": 2.0},
    }
    plot.save(rows, str(tmp_path / "plots" / "layer.png"))
    assert (tmp_path / "plots" / "layer.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="got none"):
        plot.save([], str(tmp_path / "empty.png"))


@pytest.mark.gpu
def test_parts_on_the_gpu(tmp_path):
    rows = command.main(
        ["--shape", "1024,2,8,512,256", "--quick", "--plot", str(tmp_path / "layer.png")]
    )
    kernels = [r for r in rows if r["part"] == "kernels" and r["layer"] in FP8MOE]
    assert all(r["us"] > 0 for r in kernels if "us" in r and r["op"] != "between kernels")
    assert all(r["sum us"] > 0 for r in kernels if r["op"].startswith("our "))
    assert {"% of copy", "TFLOP/s"} <= {key for r in kernels if "us" in r for key in r}
    for row in rows:
        if row["part"] == "time":
            assert row["peak GiB"] > 0 and row["graph ms"] > 0, row


@pytest.mark.gpu
def test_peak_bytes_sees_a_temporary():
    x = torch.randn(1 << 20, device="cuda")
    assert peak_bytes(lambda: (x.repeat(8).sum(),)) >= 32 << 20
