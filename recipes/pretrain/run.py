"""The folder of a run: who may write to it, and what was agreed when it began."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

import fp8moe

from . import checkpoint
from .config import FREE, Config, UserError, load, option
from .data import Corpus

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunFolder:
    """``runs_dir/name``. Nothing is written before ``create`` or ``reopen``."""

    def __init__(self, runs_dir: Path, name: str):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--name: expected letters, digits, '.', '_' and '-', beginning with a letter or "
                f"a digit, got {name!r}"
            )
        self.path = runs_dir / name
        self.name = name
        self._lock: int | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def is_run(self) -> bool:
        return (self.path / CONFIG).is_file()

    @property
    def is_free(self) -> bool:
        """Whether there is nothing there that a new run could harm."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(item.name == _LOCK for item in self.path.iterdir())

    def check_new(self, overwrite: bool) -> None:
        """Raises UserError if a new run may not take this folder."""
        if self.is_free:
            return
        if not self.is_run:
            raise UserError(f"{self.path} exists and is not a run: choose another --name")
        if not overwrite:
            raise UserError(
                f"{self.path} holds a run already: continue it with --resume, replace it with "
                "--overwrite, or choose another --name"
            )

    def settings(self) -> dict[str, Any]:
        """What ``create`` wrote."""
        if not self.is_run:
            raise UserError(f"--resume: {self.path} holds no run")
        return json.loads((self.path / CONFIG).read_text(encoding="utf-8"))

    def acquire(self) -> None:
        """Takes the folder for this process, until it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise UserError(f"{self.path}: another process is writing to this run") from error
        self._lock = handle

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self, preset: str, config: Config, corpus: Corpus, overwrite: bool) -> None:
        """Begins a new run, in place of an old one if ``overwrite``."""
        self.acquire()
        self.check_new(overwrite)
        # config.json stays until the new one replaces it: a kill in between leaves a folder that
        # is still a run, which --overwrite takes again.
        old = [item for item in self.path.iterdir() if item.name not in (_LOCK, CONFIG)]
        for item in sorted(old):  # checkpoints first
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        self._write(preset, config, corpus)

    def _write(self, preset: str, config: Config, corpus: Corpus) -> None:
        settings = {
            "preset": preset,
            "config": dataclasses.asdict(config),
            "data": corpus.summary(),
            "versions": {
                "fp8moe": fp8moe.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "device": torch.cuda.get_device_name() if config.device == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
        }
        checkpoint.write_json(self.path / CONFIG, settings)

    def reopen(self, preset: str, config: Config, corpus: Corpus) -> None:
        """Takes the folder of an existing run, and notes the settings that may change."""
        self.acquire()
        self._write(preset, config, corpus)


def next_name(runs_dir: Path, preset: str) -> str:
    """``<preset>-<n>`` with the first n that is free."""
    n = 1
    while not RunFolder(runs_dir, f"{preset}-{n}").is_free:
        n += 1
    return f"{preset}-{n}"


def resumed_config(
    settings: dict[str, Any], preset: str | None, overrides: dict[str, Any]
) -> tuple[str, Config]:
    """The config of the run that is resumed.

    Raises:
        UserError: an option given now differs from the one the run began with.
    """
    saved = load(settings["config"])
    if preset is not None and preset != settings["preset"]:
        raise UserError(f"--resume: the run began with --preset {settings['preset']}, got {preset}")
    for name, value in overrides.items():
        if name not in FREE and value != getattr(saved, name):
            raise UserError(
                f"--resume: the run began with --{option(name)} {getattr(saved, name)}, got {value}"
            )
    config = dataclasses.replace(saved, **overrides)
    config.check()
    return settings["preset"], config


def check_same_data(settings: dict[str, Any], corpus: Corpus) -> None:
    """Raises UserError if the text is not the one that the run began with."""
    before, now = settings["data"], corpus.summary()
    for name in ("sha256", "bytes", "files", "train_bytes", "valid_bytes"):
        if before[name] != now[name]:
            raise UserError(
                f"--resume: the text has changed since the run began ({corpus.source}): "
                f"expected {name} {before[name]}, got {now[name]}"
            )
