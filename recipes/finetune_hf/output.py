"""The folder of a run: written whole, beside its place, then renamed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.pretrain.config import UserError

REPORT = "report.json"


def check_free(path: Path, overwrite: bool) -> None:
    """Raises: UserError if a new run may not take this path."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / REPORT).is_file():
        raise UserError(f"--output: {path} exists and holds no {REPORT}: choose another folder")
    if not overwrite:
        raise UserError(f"--output: {path} holds a run already: choose another, or --overwrite")


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error.

    Raises: UserError as `check_free`, before and after the block, and for a place that cannot be
        written to.
    """
    check_free(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"--output: cannot write to {path.parent}: {error.strerror}") from error
    with folder as temporary:
        made = Path(temporary) / "new"
        made.mkdir()
        yield made
        check_free(path, overwrite)
        if path.exists():
            path.rename(Path(temporary) / "old")
        made.rename(path)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
