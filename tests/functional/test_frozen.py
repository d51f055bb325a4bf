"""frozen_swiglu_experts: against swiglu_experts bit for bit, low-rank updates against FP64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from fp8moe import quant, testing
from fp8moe.config import FP8Config
from fp8moe.functional import LowRank, frozen_swiglu_experts, observe_fp8, swiglu_experts
from fp8moe.functional.frozen import FrozenLinear

RANK = 16
SCALING = 2.0

# SQNR of one layer on Gaussian data with exact weights: activations and gradients alone are rounded
# to FP8. Measured 25.5 to 26.8 on these inputs, experts of low-rank gradients apart.
GATE_DB = 24.8
WORST_TOKEN = 0.12


class Frozen(NamedTuple):
    """A layer of the conftest with FP8 weights and low-rank factors."""

    layer: Any
    w13: quant.FP8Tensor
    w2: quant.FP8Tensor
    factors: tuple[torch.Tensor, ...]  # a13, b13, a2, b2

    def inputs(self) -> dict[str, torch.Tensor]:
        named = dict(zip(("a13", "b13", "a2", "b2"), self.factors, strict=True))
        named = {"x": self.layer.x, "p": self.layer.weights, **named}
        return {name: t.detach().clone().requires_grad_() for name, t in named.items()}

    def run(self, config: FP8Config | None = None, dropout: float = 0.0, **kwargs: Any):
        t = self.inputs()
        y = frozen_swiglu_experts(
            t["x"],
            self.layer.ids,
            t["p"],
            self.w13,
            self.w2,
            low_rank13=LowRank(t["a13"], t["b13"], SCALING, dropout),
            low_rank2=LowRank(t["a2"], t["b2"], SCALING, dropout),
            config=config or FP8Config(),
            **kwargs,
        )
        grads = torch.autograd.grad(y, list(t.values()), self.layer.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(t, grads, strict=True))}

    def exact(self):
        """FP64: W = dequantized w + s b a, one expert after the other."""
        t = {k: v.detach().double().requires_grad_() for k, v in self.inputs().items()}
        w13 = testing.exact(self.w13) + SCALING * t["b13"] @ t["a13"]
        w2 = testing.exact(self.w2) + SCALING * t["b2"] @ t["a2"]
        y = torch.zeros_like(t["x"])
        for e in range(len(w2)):
            token, k = (self.layer.ids == e).nonzero(as_tuple=True)
            gate, up = (t["x"][token] @ w13[e].t()).chunk(2, dim=1)
            act = t["p"][token, k, None] * torch.nn.functional.silu(gate) * up
            y = y.index_add(0, token, act @ w2[e].t())
        grads = torch.autograd.grad(y, list(t.values()), self.layer.dy.double())
        return {"y": y.detach(), **dict(zip(t, grads, strict=True))}


@pytest.fixture
def make_frozen(make_layer):
    def make(factor_dtype: torch.dtype = torch.float32, **kwargs: Any) -> Frozen:
        layer = make_layer(**kwargs)
        g = torch.Generator().manual_seed(5)

        def factor(*shape: int) -> torch.Tensor:
            values = torch.randn(shape, generator=g) / (4 * shape[-1] ** 0.5)
            return values.to(layer.x.device, factor_dtype)

        e, two_i, h = layer.w13.shape
        factors = (
            factor(e, RANK, h),
            factor(e, two_i, RANK),
            factor(e, RANK, two_i // 2),
            factor(e, h, RANK),
        )
        return Frozen(layer, quant.per_block(layer.w13), quant.per_block(layer.w2), factors)

    return make


def failures(result: dict, exact: dict, ids: torch.Tensor) -> set[str]:
    failed = set()
    for name, out in result.items():
        parts = [(out, exact[name])]
        if name[0] in "ab":  # factors: every expert for itself
            for e in range(len(out)):
                if (ids == e).any():
                    parts.append((out[e], exact[name][e]))
                elif out[e].any():
                    failed.add(name)
        if any(testing.sqnr_db(a, b) < GATE_DB for a, b in parts):
            failed.add(name)
        if name in ("y", "x") and testing.worst_row_error(out, exact[name]) > WORST_TOKEN:
            failed.add(name)
    return failed


# ------------------------------------------------------------------------------ without updates


@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
@pytest.mark.parametrize("keep_transpose", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "zipf", "one_hot"])
def test_bitwise_the_trainable_layer_on_dequantized_weights(make_layer, save, keep_transpose, kind):
    layer = make_layer(kind=kind, dropped=0.1)
    config = FP8Config(save=save)
    w13, w2 = quant.per_block(layer.w13), quant.per_block(layer.w2)
    kept = {}
    if keep_transpose:
        kept = {"w13_t": quant.transpose_per_block(w13), "w2_t": quant.transpose_per_block(w2)}

    def run(function):
        x, p = layer.x.clone().requires_grad_(), layer.weights.clone().requires_grad_()
        y = function(x, p)
        return y, *torch.autograd.grad(y, (x, p), layer.dy)

    frozen = run(
        lambda x, p: frozen_swiglu_experts(x, layer.ids, p, w13, w2, config=config, **kept)
    )
    full = [quant.dequantize(w) for w in (w13, w2)]
    trainable = run(lambda x, p: swiglu_experts(x, layer.ids, p, *full, config=config))
    for mine, theirs in zip(frozen, trainable, strict=True):
        assert torch.equal(mine, theirs)


def test_a_zero_update_changes_nothing(make_frozen):
    frozen = make_frozen()
    a13, b13, a2, b2 = frozen.factors
    zero = frozen._replace(factors=(a13, torch.zeros_like(b13), a2, torch.zeros_like(b2)))
    plain = frozen_swiglu_experts(
        frozen.layer.x, frozen.layer.ids, frozen.layer.weights, frozen.w13, frozen.w2
    )
    result = zero.run()
    assert torch.equal(result["y"], plain)
    assert not result["a13"].any() and not result["a2"].any()
    assert result["b13"].any() and result["b2"].any()


# --------------------------------------------------------------------------------- with updates

SHAPES = {
    "uniform": {},
    "zipf": {"kind": "zipf"},
    "two experts take all": {"kind": "one_hot"},
    "dropped slots": {"tokens": 300, "experts": 8, "topk": 3, "dropped": 0.3},
    "wider": {"hidden": 384, "inner": 256, "seed": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("save", ["bf16", "recompute"])
def test_output_and_gradients_against_fp64(make_frozen, shape, save):
    frozen = make_frozen(**SHAPES[shape])
    result = frozen.run(FP8Config(save=save))
    assert failures(result, frozen.exact(), frozen.layer.ids) == set()


def test_bf16_factors_have_bf16_gradients_within_the_gates(make_frozen):
    frozen = make_frozen(factor_dtype=torch.bfloat16)
    result = frozen.run()
    assert result["a13"].dtype == result["b2"].dtype == torch.bfloat16
    assert failures(result, frozen.exact(), frozen.layer.ids) == set()


def planted(frozen: Frozen, error: str) -> dict:
    a13, b13, a2, b2 = frozen.factors
    result = frozen.run()
    if error == "scaling forgotten":
        return frozen._replace(factors=(a13, b13 / SCALING, a2, b2 / SCALING)).run()
    if error == "update of w13 missing":
        return frozen._replace(factors=(a13, torch.zeros_like(b13), a2, b2)).run()
    if error == "update of w2 from another expert":
        return frozen._replace(factors=(a13, b13, a2.roll(1, 0), b2)).run()
    if error == "gate and up rows of the update swapped":
        swapped = torch.cat(b13.chunk(2, dim=1)[::-1], dim=1)
        return frozen._replace(factors=(a13, swapped, a2, b2)).run()
    if error == "one expert's gradient zeroed":
        a = result["a13"].clone()
        a[1] = 0
        return {**result, "a13": a}
    raise AssertionError(error)


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        ("scaling forgotten", {"y", "x", "p"}),
        ("update of w13 missing", {"y", "x", "a13", "p"}),
        ("update of w2 from another expert", {"y", "x", "b2"}),
        ("gate and up rows of the update swapped", {"y", "x", "a13"}),
        ("one expert's gradient zeroed", {"a13"}),
    ],
)
def test_gates_catch_planted_errors(make_frozen, error, caught):
    frozen = make_frozen()
    assert caught <= failures(planted(frozen, error), frozen.exact(), frozen.layer.ids)


def test_recomputing_repeats_the_dropout(make_frozen):
    frozen = make_frozen()
    kept, again = (
        (torch.manual_seed(3), frozen.run(FP8Config(save=save), dropout=0.5))[1]
        for save in ("bf16", "recompute")
    )
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    other = frozen.run(dropout=0.5)  # the generator has moved on
    assert not torch.equal(other["y"], kept["y"])


def test_save_fp8_keeps_the_hidden_activation_in_half_the_bytes(make_layer):
    layer = make_layer(tokens=512)
    w13, w2 = quant.per_block(layer.w13), quant.per_block(layer.w2)

    def saved(save: str) -> int:
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        x = layer.x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            frozen_swiglu_experts(x, layer.ids, layer.weights, w13, w2, config=FP8Config(save=save))
        weights = sum(t.numel() * t.element_size() for w in (w13, w2) for t in w)
        return sum(sizes.values()) - weights

    bf16, fp8 = saved("bf16"), saved("fp8")
    hidden = (512 * 2 + 3 * 128) // 128 * 128 * 2 * 128  # rows with padding, 2I
    assert hidden * 0.9 < bf16 - fp8 < hidden * 1.1


def test_no_weight_gradient_is_computed(make_layer):
    """Nothing is saved or cast for wgrad: observers see fprop's and dgrad's operands alone."""
    layer = make_layer()
    w13, w2 = quant.per_block(layer.w13), quant.per_block(layer.w2)
    seen: list[str] = []
    x = layer.x.clone().requires_grad_()
    with observe_fp8(lambda kind, t: seen.append(kind)):
        y = frozen_swiglu_experts(x, layer.ids, layer.weights, w13, w2)
        y.backward(layer.dy)
    assert sorted(seen) == sorted(["x", "w13", "act", "w2", "dy", "dh"])


def test_autocast_and_other_dtypes(make_frozen):
    frozen = make_frozen(dtype=torch.float32)
    x, ids, p = frozen.layer.x, frozen.layer.ids, frozen.layer.weights
    y = frozen_swiglu_experts(x, ids, p, frozen.w13, frozen.w2)
    assert y.dtype == torch.float32
    with torch.autocast(x.device.type, torch.bfloat16):
        mixed = frozen_swiglu_experts(x, ids.int(), p.bfloat16(), frozen.w13, frozen.w2)
    assert mixed.dtype == torch.bfloat16
    assert testing.sqnr_db(mixed, y) > 35  # the routing weights were rounded to BF16


def test_no_tokens(make_frozen):
    frozen = make_frozen()
    layer = frozen.layer
    empty = layer.but(x=layer.x[:0], ids=layer.ids[:0], weights=layer.weights[:0], dy=layer.dy[:0])
    result = frozen._replace(layer=empty).run()
    assert result["y"].shape == (0, layer.x.shape[1])
    assert not any(result[name].any() for name in ("a13", "b13", "a2", "b2"))


def test_compiles_without_graph_breaks(make_frozen):
    frozen = make_frozen()
    t = frozen.inputs()

    def step(x, p, a13, b13, a2, b2):
        low = LowRank(a13, b13, SCALING), LowRank(a2, b2, SCALING)
        return frozen_swiglu_experts(
            x, frozen.layer.ids, p, frozen.w13, frozen.w2, low_rank13=low[0], low_rank2=low[1]
        )

    expected = step(*t.values())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*t.values())
    assert torch.equal(compiled, expected)
    leaves = list(t.values())
    first = torch.autograd.grad(expected, leaves, frozen.layer.dy)
    second = torch.autograd.grad(compiled, leaves, frozen.layer.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_forward_and_backward_read_nothing_on_the_host(make_frozen):
    frozen = make_frozen()
    frozen.run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        frozen.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------ bad input


def _call(frozen: Frozen, **changes: Any) -> torch.Tensor:
    layer = frozen.layer
    args = {
        "x": layer.x,
        "topk_ids": layer.ids,
        "topk_weights": layer.weights,
        "w13": frozen.w13,
        "w2": frozen.w2,
        "low_rank13": LowRank(*frozen.factors[:2], 1.0),
        "low_rank2": LowRank(*frozen.factors[2:], 1.0),
        "config": FP8Config(),
    }
    return frozen_swiglu_experts(**{**args, **changes})


def _shapes(frozen: Frozen) -> dict[str, tuple[dict[str, Any], str]]:
    w13, w2 = frozen.w13, frozen.w2
    a13, b13, *_ = frozen.factors
    narrow = quant.per_block(torch.randn(4, 256, 80, device=a13.device))
    return {
        "BF16 weights": ({"w13": (w13.data.bfloat16(), w13.scale)}, r"w13\.data: expected"),
        "scale of another block size": (
            {"w2": quant.FP8Tensor(w2.data, w2.scale.repeat_interleave(2, 1))},
            r"w2\.scale: expected shape",
        ),
        "sizes that are not multiples of 128": ({"w2": narrow}, "multiple of 128, got 80"),
        "w13 of another size": ({"w13": w2}, r"w13\.data: expected shape"),
        "a BF16 fprop": ({"config": FP8Config(fprop="bf16")}, "expected fprop='fp8'"),
        "rank": ({"low_rank13": LowRank(a13[:, :4].contiguous(), b13, 1.0)}, "multiple of 8"),
        "b of another rank": (
            {"low_rank13": LowRank(a13[:, :8].contiguous(), b13, 1.0)},
            r"low_rank13\.b: expected shape",
        ),
        "a of another width": (
            {"low_rank2": LowRank(a13, b13, 1.0)},
            r"low_rank2\.a: expected shape",
        ),
        "dropout": ({"low_rank13": LowRank(a13, b13, 1.0, 1.0)}, "0 <= dropout < 1, got 1.0"),
        "transpose of another weight": (
            {"w13_t": quant.transpose_per_block(w2)},
            r"w13_t\.data: expected shape",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "BF16 weights",
        "scale of another block size",
        "sizes that are not multiples of 128",
        "w13 of another size",
        "a BF16 fprop",
        "rank",
        "b of another rank",
        "a of another width",
        "dropout",
        "transpose of another weight",
    ],
)
def test_bad_input_is_refused(make_frozen, case, monkeypatch):
    def never(*args: Any) -> None:
        raise AssertionError("work was done before the arguments were checked")

    frozen = make_frozen()
    assert _call(frozen).shape == frozen.layer.x.shape
    changes, message = _shapes(frozen)[case]
    if "w13" in changes and not isinstance(changes["w13"], quant.FP8Tensor):
        changes["w13"] = quant.FP8Tensor(*changes["w13"])
    monkeypatch.setattr(FrozenLinear, "apply", never)
    with pytest.raises(ValueError, match=message):
        _call(frozen, **changes)
