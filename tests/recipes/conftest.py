"""The text that the tests of the recipes train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few files of code, small enough to load at once."""
    folder = tmp_path_factory.mktemp("text")
    source = Path(torch.__file__).parent / "nn" / "modules"
    for file in sorted(source.glob("*.py"))[:20]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
