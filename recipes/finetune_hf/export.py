"""What a run leaves: a model that transformers loads, one in block FP8, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fp8moe
from fp8moe.integrations.adapters import save_adapters
from fp8moe.integrations.checkpoint import export_fp8_checkpoint

from .settings import Settings


def _save_and_merge_adapters(model: Any, folder: Path) -> Any:
    """attention/ and experts/, both in PEFT's format; then the model without adapters."""
    # Embeddings are not trained; looking for changes in them would ask the hub for the model.
    model.save_pretrained(folder / "attention", save_embedding_layers=False)
    model = model.merge_and_unload()
    save_adapters(model, folder / "experts")
    fp8moe.merge_adapters(model)
    return model


def export(model: Any, tokenizer: Any | None, folder: Path, settings: Settings) -> list[Path]:
    """Writes the model into `folder`.

    Returns: model/ (safetensors, loads with from_pretrained), with --export-fp8 fp8/ too. After
        LoRA the experts exist in FP8 only: adapters/, and fp8/ with the adapters merged.
    """
    written = []
    if settings.lora:
        model = _save_and_merge_adapters(model, folder / "adapters")
        written.append(folder / "adapters")
    else:
        model.save_pretrained(folder / "model")
        written.append(folder / "model")
    if settings.lora or settings.export_fp8:
        export_fp8_checkpoint(model, folder / "fp8")
        written.append(folder / "fp8")
    if tokenizer is not None:
        for path in written:
            tokenizer.save_pretrained(path)
    return written
