"""Block-FP8 checkpoints of models, the format of DeepSeek-V3 (see quant/checkpoint.py).

    export_fp8_checkpoint(model, "out")             # experts in FP8, the rest as it is
    model = model_from_fp8_checkpoint("out")        # BF16 parameters to train further
    model = model_from_fp8_checkpoint("out", frozen=True)  # experts stay FP8

Names are those of the model's published checkpoints, one matrix per expert, as vLLM, SGLang and
transformers expect them. Import reads one tensor at a time; the experts of a frozen model never
exist in another precision.
"""

from fp8moe.integrations.checkpoint_export import export_fp8_checkpoint
from fp8moe.integrations.checkpoint_import import load_fp8_checkpoint, model_from_fp8_checkpoint

__all__ = ["export_fp8_checkpoint", "load_fp8_checkpoint", "model_from_fp8_checkpoint"]
