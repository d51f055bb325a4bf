"""nn.Modules: Router, Experts, MoE, and the permutation between tokens and experts."""

from fp8moe.modules.convert import ReplacementReport, replace_experts
from fp8moe.modules.experts import Experts
from fp8moe.modules.moe import MoE, MoEOutput, SharedExperts
from fp8moe.modules.permute import Permutation, permutation, permute, unpermute
from fp8moe.modules.router import Router, RouterOutput

__all__ = [
    "Experts",
    "MoE",
    "MoEOutput",
    "Permutation",
    "ReplacementReport",
    "Router",
    "RouterOutput",
    "SharedExperts",
    "permutation",
    "permute",
    "replace_experts",
    "unpermute",
]
