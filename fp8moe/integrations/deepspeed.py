"""DeepSpeed: the experts of its MoE layers as one grouped FP8 layer.

    model = build_model()                             # has deepspeed.moe.layer.MoE layers
    replace_deepspeed_experts(model, config=FP8Config())
    engine, *_ = deepspeed.initialize(model=model, ...)

    engine, *_ = deepspeed.initialize(model=hf_model, ...)   # "expert_parallel" in its config
    replace_deepspeed_experts(engine, config=FP8Config())

`deepspeed.moe.layer.MoE` holds one module per local expert and runs them in a loop over a buffer
(G, E, C, H): G ranks of the expert group sent C rows to each of E local experts, unused rows zero.
Here all of them become two stacked parameters and one call of `swiglu_experts`. A zero row gives a
zero output and no gradient in a SwiGLU expert without biases, so zero rows are dropped, not
computed: with unlimited capacity most of the buffer is that. Routing, capacity and the exchange
between ranks stay DeepSpeed's.

AutoEP keeps three parameters of its own, w1 (gate), w3 (up) and w2 (down), which ZeRO has arranged
by the time they can be seen. They stay as they are; gate and up are concatenated in each forward,
so their FP8 copy is made once per micro-batch and not once per step, and lives until backward. With
`cache_weights=False`, which ZeRO stage 3 needs, it is the concatenation that lives until backward:
activation checkpointing shortens that to one layer at a time.

Gradients arrive in `.grad` in the dtype of the parameter, rounded once from the FP32 accumulators
of the GEMM; DeepSpeed adds them up in `data_types.grad_accum_dtype`, its own optimizers keep the
FP32 master weights. FP8 copies of weights are dropped by every engine.step(), because each
of DeepSpeed's optimizers steps a torch.optim optimizer in the process; see `weight_cache.py` for
what is not seen.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional import swiglu_experts
from fp8moe.functional.arguments import check_config, check_size

_LAYOUTS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
    ("w13", "w2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
"""Names of an expert's linear layers: gate, up and down, or gate and up in one and down."""


class Replaced(NamedTuple):
    """One layer whose experts were replaced.

    Args:
        name: of the MoE layer within the model.
        kind: "MoE" or "AutoEP".
        num_local_experts: experts that this process holds.
        hidden_size: H. intermediate_size: I.
    """

    name: str
    kind: str
    num_local_experts: int
    hidden_size: int
    intermediate_size: int


class DeepSpeedExperts(nn.Module):
    """y[g, e, c] = (silu(x w1[e]^T) * (x w3[e]^T)) w2[e]^T, x = inputs[g, e, c].

    Stands where DeepSpeed's `Experts` stood. Its state dict has DeepSpeed's keys, one set for each
    expert (`deepspeed_experts.3.up_proj.weight`), so weights go from and to a model that was not
    replaced. Optimizer states do not: see
    deepspeed_checkpoint.py.

    Args:
        experts: DeepSpeed's `Experts`, whose weights are copied.
        layout: a row of _LAYOUTS, the names of an expert's linear layers.
        config: precision of each GEMM.

    Parameters: w13 (E, 2I, H), gate rows then up rows; w2 (E, H, I); with the `allreduce` and
        `group_name` of DeepSpeed's expert parameters.

    Shapes: forward takes (G, E, C, H) and returns the same shape.
    """

    def __init__(self, experts: Any, layout: tuple[str, ...], config: FP8Config) -> None:
        super().__init__()
        self.layout, self.config = layout, config
        modules = experts.deepspeed_experts
        self.num_local_experts = len(modules)
        first: Any = modules[0].get_parameter(f"{layout[0]}.weight")
        stacks: list[list[torch.Tensor]] = [[], []]
        for module in modules:
            *gate_up, down = (module.get_parameter(f"{name}.weight").detach() for name in layout)
            stacks[0].append(torch.cat(gate_up))
            stacks[1].append(down)
        self.w13, self.w2 = (
            nn.Parameter(torch.stack(s), requires_grad=first.requires_grad) for s in stacks
        )
        w: Any
        for w in (self.w13, self.w2):
            w.allreduce = False
            w.group_name = first.group_name
            w.is_expert_group = True  # Muon orthogonalises each expert's matrix by itself

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        experts = self.num_local_experts
        ids = torch.arange(experts, device=inputs.device).view(1, experts, 1)
        used = inputs.detach().any(dim=-1)  # a NaN counts as used
        y = _grouped(
            inputs.reshape(-1, inputs.shape[-1]),
            ids.where(used, experts).reshape(-1),
            self.w13,
            self.w2,
            self.config,
        )
        return y.view(inputs.shape)

    def extra_repr(self) -> str:
        _, hidden, intermediate = self.w2.shape
        c = self.config
        return (
            f"num_local_experts={self.num_local_experts}, hidden_size={hidden}, "
            f"intermediate_size={intermediate}, fprop={c.fprop}, dgrad={c.dgrad}, wgrad={c.wgrad}"
        )

    def _pieces(self) -> Iterator[tuple[str, torch.Tensor]]:
        """DeepSpeed's key of each weight of each expert, and the part of w13 or w2 that it is."""
        for e in range(self.num_local_experts):
            parts = (*self.w13[e].chunk(len(self.layout) - 1), self.w2[e])
            for name, part in zip(self.layout, parts, strict=True):
                yield f"deepspeed_experts.{e}.{name}.weight", part

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for key, part in self._pieces():
            destination[prefix + key] = part if keep_vars else part.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected = [key for key in state_dict if key.startswith(prefix)]
        with torch.no_grad():
            for name, part in self._pieces():
                key = prefix + name
                if key not in state_dict:
                    missing_keys.append(key)
                    continue
                unexpected.remove(key)
                if state_dict[key].shape != part.shape:
                    shapes = f"expected {tuple(part.shape)}, got {tuple(state_dict[key].shape)}"
                    error_msgs.append(f"{key}: {shapes}")
                else:
                    part.copy_(state_dict[key])
        if strict:
            unexpected_keys.extend(unexpected)


def _grouped(
    x: torch.Tensor, ids: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, config: FP8Config
) -> torch.Tensor:
    """The experts on rows (R, H) that each belong to one expert, ids (R,), or to none, id E."""
    weights = torch.ones((len(ids), 1), dtype=torch.float32, device=x.device)
    return swiglu_experts(x, ids.unsqueeze(1), weights, w13, w2, config=config)


def _autoep_forward(
    experts: Any, x: torch.Tensor, num_tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """What `GroupedExperts.forward` of a replaced AutoEP layer is: rows (R, H) in expert order."""
    w1, w2, w3 = experts.w1, experts.w2, experts.w3
    ends = num_tokens_per_expert.cumsum(0)
    rows = torch.arange(len(x), device=x.device)
    ids = torch.searchsorted(ends, rows, right=True)  # E past the last group: dropped
    w13 = torch.cat([w1, w3], dim=1)
    return _grouped(x, ids, w13, w2, experts.fp8moe_config)


def replace_deepspeed_experts(
    model: nn.Module, *, config: FP8Config | None = None
) -> list[Replaced]:
    """experts(x) of every DeepSpeed MoE layer becomes one grouped SwiGLU layer, in place.

    Args:
        model: for layers of `deepspeed.moe.layer.MoE`, the model before `deepspeed.initialize`
            (or one layer); for AutoEP, the engine or its module after it.
        config: precision of each GEMM; default FP8Config(). May be replaced later for MoE layers
            (`moe.deepspeed_moe.experts.config = ...`), for AutoEP by calling this again.

    Returns: what was replaced.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: naming the layer and what it has that cannot be replaced: another activation, a
            bias, other layers, sizes that the GEMMs of config cannot take, ZeRO stage 3 with
            cached FP8 weights, MoE layers that DeepSpeed has already initialised; or a model
            without any MoE layer. Nothing has been replaced then.
    """
    MoE, AutoEPMoELayer = _layer_types()
    config = FP8Config() if config is None else config
    check_config(config)
    module: Any
    native: list[tuple[str, Any, tuple[str, ...]]] = []
    autoep: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        name = name or type(module).__name__
        if isinstance(module, MoE):
            native.append((name, module, _check_native(name, module, config)))
        elif isinstance(module, AutoEPMoELayer):
            _check_autoep(name, module.experts, config)
            autoep.append((name, module))
    if not native and not autoep:
        raise ValueError(
            f"model: expected deepspeed.moe.layer.MoE layers, or AutoEP layers after "
            f"deepspeed.initialize, got {type(model).__name__} without any"
        )
    done = []
    for name, module, layout in native:
        experts = DeepSpeedExperts(module.deepspeed_moe.experts, layout, config)
        module.deepspeed_moe.experts = experts
        done.append(Replaced(name, "MoE", *experts.w2.shape))
    for name, module in autoep:
        experts = module.experts
        experts.fp8moe_config = config
        experts.forward = types.MethodType(_autoep_forward, experts)
        done.append(Replaced(name, "AutoEP", *getattr(experts.w2, "ds_shape", experts.w2.shape)))
    return done


def _layer_types() -> tuple[Any, Any]:
    try:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
        from deepspeed.moe.layer import MoE
    except ImportError as error:
        raise ImportError(
            "replace_deepspeed_experts: expected DeepSpeed 0.19.8 or newer, "
            f"pip install 'fp8moe[deepspeed]'; got {error}"
        ) from error
    return MoE, AutoEPMoELayer


def _check_native(name: str, module: Any, config: FP8Config) -> tuple[str, ...]:
    """The layout of the layer's experts. Raises: ValueError if they cannot be replaced."""
    layer = module.deepspeed_moe
    if isinstance(layer.experts, DeepSpeedExperts):
        raise ValueError(f"{name}: its experts are replaced already; set their `config` instead")
    if layer.ep_group is not None:
        raise ValueError(
            f"{name}: expected a layer that DeepSpeed has not initialised, because its optimizers "
            "keep the parameters that they were given; call replace_deepspeed_experts(model) "
            "before deepspeed.initialize"
        )
    if module.enable_expert_tensor_parallelism:
        raise ValueError(f"{name}: enable_expert_tensor_parallelism is not supported")
    experts = list(layer.experts.deepspeed_experts)
    shapes = [{k: (p.shape, p.dtype) for k, p in e.state_dict().items()} for e in experts]
    layout = next((n for n in _LAYOUTS if {f"{x}.weight" for x in n} == set(shapes[0])), None)
    if layout is None:
        wanted = "; ".join(", ".join(names) for names in _LAYOUTS)
        raise ValueError(
            f"{name}: expected a SwiGLU expert of bias-free linear layers named as one of "
            f"[{wanted}], got parameters {', '.join(shapes[0])}"
        )
    if any(s != shapes[0] for s in shapes):
        raise ValueError(f"{name}: expected equal experts, got {shapes}")
    parameters = [p for e in experts for p in e.parameters()]
    if len({p.requires_grad for p in parameters}) > 1:
        raise ValueError(f"{name}: expected all expert weights trainable or all frozen, got both")
    if any(p.is_meta or hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            f"{name}: expected weights in memory, got meta or ZeRO stage 3 parameters "
            "(deepspeed.moe.layer.MoE works with ZeRO up to stage 2)"
        )
    hidden, intermediate = shapes[0][f"{layout[-1]}.weight"][0]
    gate_up = [shapes[0][f"{x}.weight"][0] for x in layout[:-1]]
    rows = 2 * intermediate // len(gate_up)
    if any(tuple(shape) != (rows, hidden) for shape in gate_up):
        raise ValueError(
            f"{name}: expected {', '.join(layout[:-1])} of shape ({rows}, {hidden}) "
            f"beside {layout[-1]} ({hidden}, {intermediate}), got {[tuple(s) for s in gate_up]}"
        )
    _check_sizes(name, hidden, intermediate, config)
    _check_is_swiglu(name, experts[0], layout)
    return layout


def _check_sizes(name: str, hidden: int, intermediate: int, config: FP8Config) -> None:
    check_size(f"{name}: hidden size", hidden, config)
    check_size(f"{name}: intermediate size", intermediate, config)


def _check_is_swiglu(name: str, expert: nn.Module, layout: tuple[str, ...]) -> None:
    """Compare what the expert computes, with random weights, with SwiGLU: names prove nothing."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, p in expert.named_parameters():
        # Gate values around 2, where activation functions are far apart.
        w = torch.randn(p.shape, generator=generator) * (2 / p.shape[1] ** 0.5)
        weights[key] = w.to(p.device)
    *gate_up, down = (weights[f"{x}.weight"] for x in layout)
    x = torch.randn((1, 1, 8, down.shape[0]), generator=generator).to(down.device)
    devices = [down.device] if down.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        got = torch.func.functional_call(expert, weights, (x,))
        got = got[0] if isinstance(got, tuple) else got
        gate, up = F.linear(x, torch.cat(gate_up)).chunk(2, dim=-1)
        expected = F.linear(F.silu(gate) * up, down)
        error = float((got.float() - expected).norm() / expected.norm())
    if not error < 1e-2:  # TF32 GEMMs make about 1e-3, GELU in place of SiLU 1e-1
        raise ValueError(
            f"{name}: expected an expert that computes down(silu(gate(x)) * up(x)), got "
            f"{type(expert).__name__}, which on random weights is {error:.1%} off; other "
            "activations, dropout and scaling are not supported"
        )


def _check_autoep(name: str, experts: Any, config: FP8Config) -> None:
    if experts.activation != "swiglu":
        raise ValueError(f"{name}: expected activation 'swiglu', got {experts.activation!r}")
    partitioned = hasattr(experts.w1, "ds_shape")
    if partitioned and config.cache_weights:
        raise ValueError(
            f"{name}: expected FP8Config(cache_weights=False) with ZeRO stage 3, which frees "
            "the weights between uses; cached FP8 copies would stay"
        )
    _, hidden, intermediate = experts.w2.ds_shape if partitioned else experts.w2.shape
    _check_sizes(name, hidden, intermediate, config)
