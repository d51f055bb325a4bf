"""docs/finetuning.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetuning.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "adapter", "merged"}
    assert float(names["loss"].detach()) < 6
    frozen = names["frozen"].model.layers[0].mlp.experts
    assert frozen.w13.data.dtype == torch.float8_e4m3fn
