"""docs/migration.md: its code runs as written, and gives what the other library's formula gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fp8moe import testing
from fp8moe.config import FP8Config

DOCUMENT = Path(__file__).parents[2] / "docs" / "migration.md"
T, K, E, H, I = 48, 2, 4, 128, 128  # noqa: E741
GATE_DB = 22.0


def blocks():
    """(section, code) of every Python block."""
    found = []
    for section in re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = section.splitlines()[0]
        found += [(title, code) for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]
    return found


def run(section, **names):
    """Runs the introduction's code and then a section's, on these names, and returns all names."""
    scope = {}
    sections = blocks()
    for title, code in sections:
        if title != sections[0][0] and not title.startswith(section):
            continue
        if title != sections[0][0]:
            scope |= names
        exec(compile(code, str(DOCUMENT), "exec"), scope)  # noqa: S102
    assert [scope[n] for n in ("K", "E", "H", "I")] == [K, E, H, I]
    return scope


def test_the_page_runs_from_top_to_bottom():
    scope = {}
    for _, code in blocks():
        exec(compile(code, str(DOCUMENT), "exec"), scope)  # noqa: S102
    assert scope["y"].isfinite().all()


def normal(*shape):
    return 0.1 * torch.randn(*shape)


def swiglu(x, gate, up, down):
    """One expert: gate, up (I, H), down (H, I)."""
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def mixture(x, ids, weights, gate, up, down):
    y = torch.zeros_like(x)
    for e in range(E):
        weight = (weights * (ids == e)).sum(1, keepdim=True)
        y += weight * swiglu(x, gate[e], up[e], down[e])
    return y


def softmax_topk(x, router):
    weights, ids = (x @ router.t()).softmax(-1).topk(K)
    return ids, weights / weights.sum(-1, keepdim=True)


@pytest.fixture
def x():
    return torch.randn(T, H)


@pytest.fixture
def routing():
    return testing.random_topk(T, K, E, 0)


def assert_close(y, expected):
    assert testing.sqnr_db(y.detach(), expected) > GATE_DB


def grouped(x, w, sizes):
    parts = x.split(sizes)
    return torch.cat([part @ w[e].t() for e, part in enumerate(parts)])


def test_every_section_has_code_and_a_table():
    sections = DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]
    for section in sections:
        assert "```python" in section and "| there | here |" in section, section[:40]
    assert len(sections) == 6


def test_huggingface():
    model = run("Hugging Face")["model"]
    assert model.config._experts_implementation == "fp8moe_lean"
    model(torch.zeros(1, 4, dtype=torch.int64))


def test_transformer_engine(x):
    sizes = [20, 0, 15, 13]
    weights = {f"weight{e}": normal(I, H) for e in range(E)}
    y = run("TransformerEngine", te_state_dict=weights, m_splits=sizes, x=x)["y"]
    w = torch.stack(list(weights.values()))
    assert_close(y, grouped(x, w, sizes))
    with pytest.raises(AssertionError):
        assert_close(y, grouped(x, w.flip(0), sizes))


def test_torchtitan(x, routing):
    ids, weights = routing
    state = {"w1": normal(E, I, H), "w2": normal(E, H, I), "w3": normal(E, I, H)}
    y = run("torch and", titan_state_dict=state, x=x, topk_ids=ids, topk_weights=weights)["y"]
    gate, down, up = state.values()
    assert_close(y, mixture(x, ids, weights, gate, up, down))
    with pytest.raises(AssertionError):
        assert_close(y, mixture(x, ids, weights, up, gate, down))


def test_megablocks(x):
    flat = {f"experts.mlp.{name}": normal(E * I, H) for name in ("w1", "v1", "w2")}
    state = {"router.layer.weight": normal(E, H), **flat}
    y = run("MegaBlocks", megablocks_state_dict=state, x=x)["y"]
    gate, up, down = (w.view(E, I, H) for w in flat.values())
    ids, weights = softmax_topk(x, state["router.layer.weight"])
    assert_close(y, mixture(x, ids, weights, gate, up, down.transpose(1, 2)))


def test_sonicmoe(x):
    state = {
        "router.weight": normal(E, H), "c_fc.weight": normal(E, 2 * I, H),
        "c_proj.weight": normal(E, H, I),
    }  # fmt: skip
    y = run("SonicMoE", sonic_state_dict=state, x=x)["y"]
    gate, up = state["c_fc.weight"].unflatten(1, (I, 2)).unbind(2)
    logits, ids = (x @ state["router.weight"].t()).topk(K)
    assert_close(y, mixture(x, ids, logits.softmax(-1), gate, up, state["c_proj.weight"]))


def test_grouped_gemm(x, routing):
    ids, _ = routing
    b = normal(E, H, H)
    y = run("grouped_gemm", x=x, topk_ids=ids, b=b)["y"]
    expected = torch.stack([sum(x[t] @ b[e].t() for e in ids[t]) for t in range(T)])
    assert_close(y, expected)


def test_the_introduction_gives_a_config():
    assert run("-")["config"] == FP8Config()
