"""One model from loading to its trained state, in full or through adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import fp8moe
from recipes.pretrain.config import UserError

from . import models
from .data import Text
from .settings import Settings
from .training import train

Log = Callable[[str, str], None]


def _attach_adapters(model: Any, settings: Settings) -> Any:
    """PEFT's adapters on attention, and experts frozen in FP8 with low-rank updates."""
    import peft

    targets = models.attention_projections(model)
    if not targets:
        raise UserError("--lora: found no linear layers in attention blocks")
    lora = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, lora)
    # After PEFT, which freezes every parameter that is not its own.
    try:
        fp8moe.freeze_experts(model, lora_rank=settings.lora_rank, lora_alpha=settings.lora_alpha)
    except ValueError as error:
        raise UserError(f"--lora: {error}") from error
    return model


def finetune(
    precision: str, text: Text, settings: Settings, log: Log
) -> tuple[Any, dict[str, Any]]:
    """Loads and trains a model.

    Args:
        precision: of the experts, "fp8" or "bf16".

    Returns: the trained model, with its adapters, and what was measured.

    Raises: UserError.
    """
    model = models.load_model(settings)
    if precision == "fp8":
        models.use_fp8_experts(model)
    parameters = models.count_parameters(model)
    if settings.lora:
        model = _attach_adapters(model, settings)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = settings.model or f"random {model.config.model_type}"
    kind = "adapters" if settings.lora else "all weights"
    log(
        "model",
        f"{name}: {parameters / 1e6:,.2f} M parameters, {trainable / 1e6:,.2f} M trained "
        f"({kind}), experts {precision}",
    )
    result = train(model, text, settings, lambda line: log(precision, line))
    measured = {"parameters": parameters, "trainable": trainable, **dataclasses.asdict(result)}
    return model, measured
