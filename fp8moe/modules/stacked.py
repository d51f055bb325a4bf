"""Experts kept as `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I): Hugging Face's layout.

A module of this kind takes hidden states and a finished routing. Transformers describes its
variants by attributes (`has_gate`, `has_bias`, `is_transposed`, `is_concatenated`) and by a method
`_apply_gate`, which a class overrides for anything but activation(gate) * up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional import gated_experts
from fp8moe.functional.arguments import FLOATS, check_config, size_unit
from fp8moe.modules.probe import distance, evaluating

_PROBE_TOKENS = 8


def is_silu(activation: Any) -> bool:
    """Whether an activation, a module or a function, is SiLU (also called swish)."""
    # Transformers has a SiLU module of its own, which this layer may not import.
    return (
        isinstance(activation, nn.SiLU)
        or activation is F.silu
        or type(activation).__name__ == "SiLUActivation"
    )


def _name(activation: Any) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


def _gate(experts: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The gating function of a class of transformers, gate and up rows to I; None if SwiGLU."""
    gating: Any = getattr(experts, "_apply_gate", None)
    if gating is None or (_is_default(experts) and is_silu(getattr(experts, "act_fn", None))):
        return None
    return gating


def _is_default(experts: nn.Module) -> bool:
    """Whether a module of transformers gates as most do: activation(gate) * up."""
    # Not the __name__: in a model compiled by torch 2.11 a bound method has another one.
    code = getattr(getattr(experts, "_apply_gate", None), "__code__", None)
    return code is not None and code.co_name == "_default_apply_gate"


def unsupported(experts: nn.Module, *, swiglu: bool = True) -> str | None:
    """Why swiglu_experts does not compute what this module does; None if it does.

    Args:
        experts: a module in this layout, or one of its variants.
        swiglu: False: gated_experts with the module's own gate would do as well.
    """
    found = []
    if not getattr(experts, "has_gate", True):
        found.append("experts without a gate projection")
    if getattr(experts, "has_bias", False):
        found.append("biases")
    if getattr(experts, "is_transposed", False):
        found.append("transposed weights (E, H, 2I) and (E, I, H)")
    if not getattr(experts, "is_concatenated", True):
        found.append("interleaved gate and up rows")
    gate, activation = _gate(experts), getattr(experts, "act_fn", None)
    if gate is not None and not _is_default(experts):
        if swiglu or found:
            found.append("a gating function of its own (a clamp or the like)")
    elif not is_silu(activation) and (swiglu or gate is None):
        found.append(f"activation {_name(activation)}")
    if found:
        return f"{', '.join(found)}; expected silu(gate) * up with (E, 2I, H) and (E, H, I)"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            return f"{name}: {_name(weight)}; expected a 3-dimensional tensor"
        if weight.dtype not in FLOATS:
            return f"{name} in {weight.dtype}; expected bfloat16, float16 or float32"
    return None


def misfit(experts: Any) -> str | None:
    """Why a module that `unsupported` lets pass is not silu(gate) * up after all; None if it is.

    Looks at shapes and the arguments of forward. Classes of transformers describe the rest by
    attributes; another module, unless on the meta device or sharded, is run on random tokens and
    compared with the formula.
    """
    w13, w2 = experts.gate_up_proj, experts.down_proj
    (e, hidden, inner), got = w2.shape, tuple(w13.shape)
    if got != (e, 2 * inner, hidden):
        return (
            f"gate_up_proj is {got}; expected (E, 2I, H) = {(e, 2 * inner, hidden)} beside "
            f"down_proj {(e, hidden, inner)}"
        )
    arguments = list(inspect.signature(experts.forward).parameters)
    if len(arguments) != 3:
        return (
            "expected forward(hidden_states, top_k_index, top_k_weights), got "
            f"forward({', '.join(arguments)})"
        )
    described = isinstance(experts, StackedExperts) or hasattr(experts, "is_concatenated")
    runs = not w13.is_meta and not hasattr(w13, "full_tensor")
    return None if described or not runs else _probe(experts)


def _probe(experts: Any) -> str | None:
    w13, w2 = experts.gate_up_proj, experts.down_proj
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(2 * _PROBE_TOKENS).view(_PROBE_TOKENS, 2) % w2.shape[0]
    weights = torch.rand(ids.shape, generator=generator).to(w2.device, w2.dtype)
    tokens = torch.randn(_PROBE_TOKENS, w2.shape[1], generator=generator)
    ids = ids.to(w2.device)
    with evaluating(experts):
        for size in (1.0, 50.0):  # clamps show with large inputs only
            x = (size * tokens).to(w2.device, w2.dtype)
            expected = torch.zeros_like(x)
            for t in range(_PROBE_TOKENS):
                for k in range(2):
                    gate, up = F.linear(x[t], w13[ids[t, k]]).chunk(2)
                    expected[t] += weights[t, k] * F.linear(F.silu(gate) * up, w2[ids[t, k]])
            try:
                off = distance(experts(x, ids, weights), expected)
            except Exception as error:  # whatever a foreign forward may raise
                return f"forward(hidden_states, top_k_index, top_k_weights) raises {error!r}"
            if not off < 0.1:  # experts that run in FP8 themselves are 0.05 off
                return (
                    "computes something else than silu(gate) * up with gate rows, then up rows: "
                    f"{off:.1%} off on random tokens of size {size:g}"
                )
    return None


def _padded(w13: torch.Tensor, w2: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights with I a multiple of `unit`: what the gate makes of zeros meets zero columns."""
    short = -w2.shape[2] % unit
    if not short:
        return w13, w2
    for name, w in (("gate_up_proj", w13), ("down_proj", w2)):
        if getattr(w, "main_grad", None) is not None:  # it would not see the gradient of a copy
            raise ValueError(
                f"{name}.main_grad: expected an intermediate size that is a multiple of {unit}, "
                f"got {w2.shape[2]}"
            )
    gate_up = w13.unflatten(1, (2, -1))
    return F.pad(gate_up, (0, 0, 0, short)).flatten(1, 2), F.pad(w2, (0, short))


def stacked_experts(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    config: FP8Config,
) -> torch.Tensor:
    """gated_experts with the weights and the gate of `experts`, in the dtype of `hidden_states`.

    Args:
        experts: with gate_up_proj (E, 2I, H) and down_proj (E, H, I), any I: one that the GEMMs
            cannot take, as tensor parallelism may leave it, is padded with zeros in each forward.
        hidden_states: (T, H), H a multiple of 16, or of 8 with all GEMMs in BF16.
        top_k_index: (T, K) integers, 0 to E; E itself drops the slot.
        top_k_weights: (T, K).

    Raises: ValueError naming the class and what it has that gated_experts does not.
    """
    reason = unsupported(experts, swiglu=False)
    if reason is not None:
        raise ValueError(f"{type(experts).__name__}: fp8moe does not support {reason}")
    weights: Any = experts
    w13, w2 = _padded(weights.gate_up_proj, weights.down_proj, size_unit(config))
    routed = hidden_states, top_k_index, top_k_weights
    y = gated_experts(*routed, w13, w2, _gate(experts), config=config)
    return y.to(hidden_states.dtype)


class StackedExperts(nn.Module):
    """y[t] = sum_k top_k_weights[t, k] (silu(g) * u) down_proj[e]^T, [g | u] = x gate_up_proj[e]^T.

    Takes the place of a module in this layout and keeps its Parameter objects under their names:
    state dicts, optimizers and adapters that know them stay valid.

    Args:
        experts: the module to replace.
        config: precision of each GEMM; may be replaced later.

    Raises: ValueError naming the class and what it has that swiglu_experts does not.
    """

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True

    def __init__(self, experts: nn.Module, config: FP8Config) -> None:
        super().__init__()
        check_config(config)
        reason = unsupported(experts)
        if reason is not None:
            raise ValueError(f"{type(experts).__name__}: fp8moe does not support {reason}")
        weights: Any = experts
        self.gate_up_proj, self.down_proj = weights.gate_up_proj, weights.down_proj
        self.act_fn = nn.SiLU()
        self.num_experts = weights.down_proj.shape[0]
        self.fp8_config = config
        self.training = experts.training

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return stacked_experts(self, hidden_states, top_k_index, top_k_weights, self.fp8_config)

    def extra_repr(self) -> str:
        e, hidden, intermediate = self.down_proj.shape
        c = self.fp8_config
        return (
            f"num_experts={e}, hidden_size={hidden}, intermediate_size={intermediate}, "
            f"fprop={c.fprop}, dgrad={c.dgrad}, wgrad={c.wgrad}"
        )
