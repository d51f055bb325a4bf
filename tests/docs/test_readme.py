"""README.md: its code runs as written, with small sizes, on a CPU too."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"
SIZES = "T, H, I, E, K = 4096, 2048, 768, 64, 8"


def test_the_code_runs(device: torch.device) -> None:
    text = README.read_text(encoding="utf-8")
    layer, modules, model = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert SIZES in layer and "from_pretrained" in model  # downloads: docs/huggingface.md runs it
    scope: dict = {}
    for code in (layer.replace(SIZES, "T, H, I, E, K = 96, 256, 128, 8, 2"), modules):
        code = code.replace('"cuda"', f'"{device.type}"').replace(
            ".cuda()", f'.to("{device.type}")'
        )
        exec(compile(code, str(README), "exec"), scope)  # noqa: S102
    for name in ("x", "logits", "w13", "w2"):  # as the comment says
        assert scope[name].grad.abs().max() > 0, name
    assert scope["y"].shape == (96, 256) and scope["router_loss"].shape == ()
