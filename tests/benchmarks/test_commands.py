"""Every benchmark: how it is called, and what it says where there is no GPU."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delenv("RANK", raising=False)
    suffix = ".__main__" if name == "layer" else ""
    main = importlib.import_module(f"benchmarks.{name}{suffix}").main
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


@pytest.mark.parametrize(
    "name", ["gemm", "memory", "layer", "lora_memory", "expert_parallel", "cluster"]
)
def test_help_says_how_it_is_called(name, monkeypatch, capsys):
    assert run(name, ["--help"], monkeypatch) == 0
    assert f"-m benchmarks.{name} [-h]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gemm", "memory", "layer", "lora_memory"])
def test_without_a_gpu_one_line_says_so(name, monkeypatch, capsys):
    assert run(name, [], monkeypatch) == 2
    assert "GPU" in capsys.readouterr().err.splitlines()[-1]
