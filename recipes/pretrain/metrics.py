"""What a run measures: one JSON object a line, and the same scalars for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .config import UserError

FILE = "metrics.jsonl"

# Record kinds. All but SPEED and PROFILE repeat bit for bit when a run is repeated, or killed and
# resumed. A request to stop adds a read of the device's counters, so LOAD and VALUES, which count
# since the last read, then come in other portions.
TRAIN = "train"  # step, model, loss, balance_loss, grad_norm, lr
VALID = "valid"  # step, model, loss
SPEED = "speed"  # step, model, step_ms, tokens_per_s, memory_bytes
LOAD = "load"  # step, model, share[layer][expert] of the routed rows
VALUES = "fp8_values"  # step, model, tensors{kind: {flushed, saturated}}
PROFILE = "profile"  # model, expert_share
SAMPLE = "sample"  # model, prompt, text

_SCALARS = {
    TRAIN: ("loss", "balance_loss", "grad_norm", "lr"),
    VALID: ("loss",),
    SPEED: ("step_ms", "tokens_per_s", "memory_bytes"),
}


class Metrics:
    """Appends records to ``metrics.jsonl`` and to TensorBoard's event files in ``folder``.

    Args:
        folder: the run's folder.
        offset: bytes of ``metrics.jsonl`` to keep: what a checkpoint recorded. The rest was
            written after it by a run that then ended, and is written again.
        step: first step that will be written, so that TensorBoard drops what follows it.
    """

    def __init__(self, folder: Path, offset: int = 0, step: int = 0):
        # Imported here: reading the records of a finished run needs no TensorBoard.
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / FILE
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < offset:
            raise UserError(
                f"{self.path}: expected at least {offset} bytes, as recorded by the checkpoint, "
                f"got {size}"
            )
        self._file = open(self.path, "ab")
        self._file.truncate(offset)
        self._file.seek(offset)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, **values}, allow_nan=True) + "\n"
        self._file.write(line.encode())
        step, model = values.get("step"), values.get("model")
        for name in _SCALARS.get(kind, ()):
            self._board.add_scalar(f"{kind}/{name}/{model}", values[name], step)
        if kind == VALUES:
            for tensor, shares in values["tensors"].items():
                for name, share in shares.items():
                    self._board.add_scalar(f"{kind}/{name}/{tensor}", share, step)

    def flush(self) -> None:
        """Hands the lines to the system: a kill of the process loses none of them."""
        self._file.flush()

    def offset(self) -> int:
        """Bytes written so far, safe on the disk: a checkpoint's mark."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._board.close()


class NoMetrics(Metrics):
    """Writes nothing: for the processes of a run that are not its first."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, **values: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def offset(self) -> int:
        return 0

    def close(self) -> None:
        pass


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in the order written."""
    path = folder / FILE
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def of_kind(
    records: Iterable[dict[str, Any]], kind: str, model: str | None = None
) -> Iterator[dict[str, Any]]:
    for record in records:
        if record["kind"] == kind and (model is None or record["model"] == model):
            yield record


def smooth(values: list[float], span: int) -> list[float]:
    """Trailing mean over ``span`` values; values that are not finite are left out."""
    out: list[float] = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i + 1 - span) : i + 1] if math.isfinite(v)]
        out.append(sum(window) / len(window) if window else math.nan)
    return out
