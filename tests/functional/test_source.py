"""No code of the functional layer or the modules reads device values on the host, but for one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fp8moe

PACKAGE = Path(fp8moe.__file__).parent
FILES = sorted([*(PACKAGE / "functional").rglob("*.py"), *(PACKAGE / "modules").rglob("*.py")])
SYNCHRONISING = {
    "item", "tolist", "cpu", "numpy", "nonzero", "synchronize",
    "bincount", "unique", "masked_select",
}  # fmt: skip


def host_reads(source: str) -> list[str]:
    """Calls of methods or functions that wait for the device, with their lines."""
    return [
        f"line {node.lineno}: {node.func.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in SYNCHRONISING
    ]


# The sizes of the messages between ranks.
ALLOWED = {PACKAGE / "functional" / "exchange.py": ["tolist"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_host_sync(path):
    found = host_reads(path.read_text(encoding="utf-8"))
    assert [read.split(": ")[1] for read in found] == ALLOWED.get(path, []), found


def test_the_search_finds_what_it_should():
    assert host_reads("n = counts.tolist()\nm = x[y.nonzero()]") == [
        "line 1: tolist",
        "line 2: nonzero",
    ]
