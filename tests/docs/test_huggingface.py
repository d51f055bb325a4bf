"""docs/huggingface.md: its code runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fp8moe.modules.stacked import StackedExperts  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for code in blocks:
        exec(compile(code, str(DOCUMENT), "exec"), scope)  # noqa: S102
    model = scope["model"]
    assert model.config._experts_implementation == "fp8moe_lean"
    assert all(p.grad is not None for p in model.parameters())
    assert len(scope["report"].replaced) == 2 and not scope["report"].left
    assert isinstance(model.model.layers[0].mlp.experts, StackedExperts)
    assert "2 of 2 expert layers replaced" in capsys.readouterr().out
