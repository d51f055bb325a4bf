"""The model of a run: loaded or built, its experts replaced, its adapters attached."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import fp8moe
from recipes.pretrain.config import UserError

from .settings import BYTES, QWEN3_MOE, Settings


def load_tokenizer(settings: Settings) -> Any | None:
    """The model's tokenizer; None for a model of bytes, which has none.

    Raises: UserError where there is neither.
    """
    if settings.model is None:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError, KeyError) as error:
        config = _config(settings.model)
        if config.get_text_config().vocab_size == BYTES:
            return None
        raise UserError(f"--model: {settings.model} has no tokenizer: {error}") from error


def _config(model: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: cannot load {model}: {error}") from error


def load_model(settings: Settings) -> Any:
    """The model on its device, in `settings.dtype`, with transformers' own experts.

    Raises: UserError where it cannot be loaded.
    """
    transformers.set_seed(settings.seed)
    if settings.model is None:
        config = transformers.Qwen3MoeConfig(**QWEN3_MOE[settings.preset])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=settings.torch_dtype)
    else:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                settings.model, dtype=settings.torch_dtype
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--model: cannot load {settings.model}: {error}") from error
    return model.to(settings.device)


def use_fp8_experts(model: nn.Module) -> fp8moe.modules.ReplacementReport:
    """All expert layers of the model in FP8.

    Raises: UserError if there is none, or one that fp8moe does not support.
    """
    report = fp8moe.replace_experts(model)
    if report.left or not report.replaced:
        raise UserError("--model: the model has expert layers that fp8moe cannot replace, or none")
    return report


def attention_projections(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside attention blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "attn" in name.rpartition(".")[0].rpartition(".")[2]
    ]


def parameter_counts(model: nn.Module) -> dict[str, int]:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": sum(p.numel() for p in model.parameters()), "trainable": trainable}


def free(device: str) -> None:
    """Gives cached device memory back, so that the next model's peak is its own."""
    fp8moe.clear_weight_cache()
    if device == "cuda":
        torch.cuda.empty_cache()
