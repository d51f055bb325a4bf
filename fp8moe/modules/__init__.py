"""nn.Modules: Router, Experts, MoE, and the permutation between tokens and experts."""

from fp8moe.modules.convert import ReplacementReport, replace_experts
from fp8moe.modules.experts import Experts
from fp8moe.modules.freeze import (
    FreezeReport,
    freeze_experts,
    merge_adapters,
    train_only_adapters,
)
from fp8moe.modules.frozen import FrozenExperts
from fp8moe.modules.gradients import (
    clip_grad_norm_,
    expert_parameter_names,
    expert_parameters,
    grad_norm,
    reduce_expert_gradients,
)
from fp8moe.modules.lora import LowRankUpdate
from fp8moe.modules.moe import MoE, MoEOutput, SharedExperts
from fp8moe.modules.permute import Permutation, permutation, permute, unpermute
from fp8moe.modules.router import Router, RouterOutput

__all__ = [
    "Experts",
    "FreezeReport",
    "FrozenExperts",
    "LowRankUpdate",
    "MoE",
    "MoEOutput",
    "Permutation",
    "ReplacementReport",
    "Router",
    "RouterOutput",
    "SharedExperts",
    "clip_grad_norm_",
    "expert_parameter_names",
    "expert_parameters",
    "freeze_experts",
    "grad_norm",
    "merge_adapters",
    "permutation",
    "permute",
    "reduce_expert_gradients",
    "replace_experts",
    "train_only_adapters",
    "unpermute",
]
