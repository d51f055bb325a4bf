"""fp8moe as an experts implementation of Hugging Face transformers.

    import fp8moe.integrations.huggingface  # registers "fp8moe"

    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fp8moe")
    model.set_experts_implementation("fp8moe")  # the same, on a model that exists

Transformers calls a registered implementation as a function of the experts module and a finished
routing. Weights stay where they are and keep their names, so checkpoints, optimizers, the Trainer,
PEFT and parallelism plans see the model that they know. A gate other than SwiGLU runs in torch
between the GEMMs; biases, transposed or interleaved weights are refused when the module is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional.arguments import check_config
from fp8moe.modules.stacked import stacked_experts

_OLDEST = (5, 7)


def _interfaces() -> tuple[Any, Any]:
    """The two registries of transformers: experts in BF16 or FP32, and its own FP8 experts."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "fp8moe.integrations.huggingface needs transformers: pip install 'fp8moe[hf]'"
        ) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ImportError(
            f"transformers: expected {'.'.join(map(str, _OLDEST))} or newer, "
            f"got {transformers.__version__}: pip install 'fp8moe[hf]'"
        )
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    return ExpertsInterface, FP8ExpertsInterface


def _forward(config: FP8Config) -> Callable[..., torch.Tensor]:
    def fp8moe_experts_forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return stacked_experts(self, hidden_states, top_k_index, top_k_weights, config)

    return fp8moe_experts_forward


def _refuse_quantized(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    raise ValueError(
        f"{type(self).__name__}: the weights of this model are FP8 already (transformers' "
        "fine-grained FP8), which fp8moe's experts implementation does not train; load the "
        "checkpoint with fp8moe.integrations.checkpoint.model_from_fp8_checkpoint, or with "
        "FineGrainedFP8Config(dequantize=True) and transformers >= 5.10"
    )


def register(config: FP8Config | None = None, *, name: str = "fp8moe") -> str:
    """Make `experts_implementation=name` run fp8moe.swiglu_experts with this config.

    Works for every class of transformers that uses the experts interface with gate_up_proj
    (E, 2I, H) and down_proj (E, H, I), without biases. Importing this module registers "fp8moe"
    with FP8Config(). Registering a name again replaces its config, also for models that use it;
    several names let models of one process differ.

    Args:
        config: which GEMMs run in FP8; FP8Config() by default.
        name: of the implementation.

    Returns: name.

    Raises: ImportError where transformers is missing or too old; ValueError for a name that belongs
        to transformers and for a config that is not an FP8Config.
    """
    config = FP8Config() if config is None else config
    check_config(config)
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a string, got {name!r}")
    experts, quantized_experts = _interfaces()
    taken = experts._global_mapping.get(name) or quantized_experts._global_mapping.get(name)
    if name == "eager" or (taken is not None and taken.__module__ != __name__):
        raise ValueError(f"name: {name!r} is an implementation of transformers itself")
    experts.register(name, _forward(config))
    quantized_experts.register(name, _refuse_quantized)
    return name


register()
