"""nn.Modules: Router, Experts, MoE, and the permutation between tokens and experts."""

from fp8moe.modules.experts import Experts
from fp8moe.modules.gradients import (
    clip_grad_norm_,
    expert_parameter_names,
    expert_parameters,
    grad_norm,
    reduce_expert_gradients,
)
from fp8moe.modules.moe import MoE, MoEOutput, SharedExperts
from fp8moe.modules.permute import Permutation, permutation, permute, unpermute
from fp8moe.modules.router import Router, RouterOutput

__all__ = [
    "Experts",
    "MoE",
    "MoEOutput",
    "Permutation",
    "Router",
    "RouterOutput",
    "SharedExperts",
    "clip_grad_norm_",
    "expert_parameter_names",
    "expert_parameters",
    "grad_norm",
    "permutation",
    "permute",
    "reduce_expert_gradients",
    "unpermute",
]
