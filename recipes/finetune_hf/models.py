"""The model of a run: loaded or built, its experts replaced, its adapters attached."""

from __future__ import annotations

import gc
from typing import Any

import torch
import transformers
from torch import nn

import fp8moe
from fp8moe.integrations.checkpoint import model_from_fp8_checkpoint
from recipes.pretrain.config import UserError

from .settings import BYTES, QWEN3_MOE, Settings


def load_tokenizer(settings: Settings) -> Any | None:
    """The model's tokenizer; None for a model of bytes, which has none.

    Raises: UserError where there is neither.
    """
    if settings.model is None or _config(settings.model).get_text_config().vocab_size == BYTES:
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model: {settings.model} has no tokenizer: {error}") from error
    if not tokenizer("text")["input_ids"]:  # what transformers makes of a folder without one
        raise UserError(f"--model: {settings.model} has no tokenizer")
    return tokenizer


def _config(model: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: cannot load {model}: {error}") from error


def load_model(settings: Settings) -> Any:
    """The model on its device, in `settings.dtype`, with transformers' own experts.

    A local block-FP8 checkpoint becomes a model to train: its experts stay FP8 for LoRA.

    Raises: UserError where it cannot be loaded.
    """
    transformers.set_seed(settings.seed)
    if settings.model is None:
        config = transformers.Qwen3MoeConfig(**QWEN3_MOE[settings.preset])
        with torch.device(settings.device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=settings.torch_dtype)
    config = _config(settings.model)
    try:
        if getattr(config, "quantization_config", None) is not None:
            return model_from_fp8_checkpoint(
                settings.model,
                frozen=settings.lora,
                dtype=settings.torch_dtype,
                device=settings.device,
            )
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=settings.torch_dtype
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model: cannot load {settings.model}: {error}") from error
    return model.to(settings.device)


def use_fp8_experts(model: nn.Module) -> None:
    """All expert layers of the model in FP8.

    Raises: UserError if there is none, or one that fp8moe does not support.
    """
    frozen = any(isinstance(module, fp8moe.FrozenExperts) for module in model.modules())
    report = fp8moe.replace_experts(model)
    if report.left or not (report.replaced or frozen):
        raise UserError("--model: the model has expert layers that fp8moe cannot replace, or none")


def count_parameters(model: nn.Module) -> int:
    """Weights of the model, those of frozen FP8 experts included, which are no nn.Parameters."""
    frozen = (m for m in model.modules() if isinstance(m, fp8moe.FrozenExperts))
    experts = sum(m.w13.data.numel() + m.w2.data.numel() for m in frozen)
    return experts + sum(p.numel() for p in model.parameters())


def attention_projections(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside attention blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "attn" in name.rpartition(".")[0].rpartition(".")[2]
    ]


def free(device: str) -> None:
    """Gives cached device memory back, so that the next model's peak is its own."""
    gc.collect()  # the Trainer and its callbacks know each other
    fp8moe.clear_weight_cache()
    if device == "cuda":
        torch.cuda.empty_cache()
