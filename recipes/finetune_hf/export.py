"""What a run leaves: a model that transformers loads, and on request one in block FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .settings import Settings


def export(model: Any, tokenizer: Any | None, folder: Path, settings: Settings) -> list[Path]:
    """Writes the model into `folder`.

    Returns: model/ (safetensors, loads with from_pretrained) and with --export-fp8 fp8/. After
        LoRA the experts exist in FP8 only, so there is fp8/ alone.
    """
    written = []
    if not settings.lora:
        model.save_pretrained(folder / "model")
        written.append(folder / "model")
    if settings.lora or settings.export_fp8:
        from fp8moe.integrations.checkpoint import export_fp8_checkpoint

        export_fp8_checkpoint(model, folder / "fp8")
        written.append(folder / "fp8")
    if tokenizer is not None:
        for path in written:
            tokenizer.save_pretrained(path)
    return written
