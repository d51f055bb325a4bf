"""FrozenExperts: expert weights that exist only in FP8, with or without low-rank updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp8moe.config import FP8Config
from fp8moe.functional import frozen_swiglu_experts
from fp8moe.functional.arguments import check_some
from fp8moe.functional.frozen import check_frozen_config
from fp8moe.modules.experts import Experts
from fp8moe.modules.lora import LowRankUpdate, check_lora
from fp8moe.quant import FP8Tensor, dequantize, transpose_per_block
from fp8moe.quant.checkpoint import stable_per_block

_BLOCK = 128
_WEIGHTS = ("w13", "w2")


def check_frozen_sizes(num_experts: int, hidden_size: int, intermediate_size: int) -> None:
    """Raises: ValueError for sizes that FrozenExperts cannot have."""
    check_some("num_experts", num_experts)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    for name, size in sizes.items():
        if size < 1 or size % _BLOCK:
            raise ValueError(
                f"{name}: frozen experts have whole 128 x 128 scale blocks; expected a positive "
                f"multiple of {_BLOCK}, got {size}"
            )


class FrozenExperts(nn.Module):
    """y[t] = sum_k p[t, k] (silu(g) * u) W2[e]^T, [g | u] = x[t] W13[e]^T, W = w or w + s B A.

    w13 and w2 are FP8 with 128 x 128 scales and have no gradient; their GEMMs, forward and for dx,
    run in FP8. They start as zeros: see `from_weights`, `set_weights`, `freeze_experts` and the
    checkpoint import.

    The bits lie in integer buffers (`w13_data` uint8, `w13_scale` int32 and so on), because
    module.to(dtype) would convert float buffers, and process groups refuse FP8. They are in the
    state dict; `w13` and `w2` show them as FP8Tensors.

    Args:
        num_experts: E.
        hidden_size: H, a multiple of 128.
        intermediate_size: I, a multiple of 128.
        config: scales of the activations and what is saved of them.
        keep_transpose: also hold the transposes that dx reads, one more byte a weight. Otherwise
            every backward makes and drops them.

    Shapes: forward takes x (T, H), topk_ids (T, K), topk_weights (T, K) and returns (T, H), as
        `fp8moe.Experts` and the experts modules of transformers do.

    Attributes:
        projections: what checkpoints call an expert's gate, up and down weights, in models that
            transformers has no names for.

    Raises: ValueError naming the argument.
    """

    projections = ("gate_proj", "up_proj", "down_proj")

    w13_data: torch.Tensor
    w13_scale: torch.Tensor
    w2_data: torch.Tensor
    w2_scale: torch.Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        config: FP8Config | None = None,
        keep_transpose: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_frozen_sizes(num_experts, hidden_size, intermediate_size)
        self.num_experts = num_experts
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.config = FP8Config() if config is None else config
        check_frozen_config(self.config)
        self.keep_transpose = keep_transpose
        shapes = {
            "w13": (num_experts, 2 * intermediate_size, hidden_size),
            "w2": (num_experts, hidden_size, intermediate_size),
        }
        for name, (e, n, k) in shapes.items():
            self._register(name, (e, n, k), True, device)
            if keep_transpose:
                self._register(f"{name}_t", (e, k, n), False, device)
        self.w13_lora: LowRankUpdate | None = None
        self.w2_lora: LowRankUpdate | None = None

    def _register(
        self, name: str, shape: tuple[int, int, int], persistent: bool, device: Any
    ) -> None:
        e, n, k = shape
        data = torch.zeros(shape, dtype=torch.uint8, device=device)
        scale = torch.zeros(e, n // _BLOCK, k // _BLOCK, dtype=torch.int32, device=device)
        self.register_buffer(f"{name}_data", data, persistent=persistent)
        self.register_buffer(f"{name}_scale", scale, persistent=persistent)

    def _fp8(self, name: str) -> FP8Tensor:
        data, scale = getattr(self, f"{name}_data"), getattr(self, f"{name}_scale")
        return FP8Tensor(data.view(torch.float8_e4m3fn), scale.view(torch.float32))

    @property
    def w13(self) -> FP8Tensor:
        """data (E, 2I, H), scale (E, 2I/128, H/128): a view."""
        return self._fp8("w13")

    @property
    def w2(self) -> FP8Tensor:
        """data (E, H, I), scale (E, H/128, I/128): a view."""
        return self._fp8("w2")

    @classmethod
    def from_weights(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        config: FP8Config | None = None,
        keep_transpose: bool = False,
    ) -> FrozenExperts:
        """The weights cast once, with the kind of scales that config has for weights.

        Args:
            w13: (E, 2I, H) BF16, FP16 or FP32. w2: (E, H, I).
        """
        config = FP8Config() if config is None else config
        shape = tuple(w2.shape)
        if w2.dim() != 3 or tuple(w13.shape) != (shape[0], 2 * shape[2], shape[1]):
            raise ValueError(
                f"w13, w2: expected (E, 2I, H) and (E, H, I), got {tuple(w13.shape)} and {shape}"
            )
        check_frozen_sizes(*shape)
        pow2 = config.pow2_weight_scales
        self = cls(*shape, config=config, keep_transpose=keep_transpose, device="meta")
        self._replace("w13", stable_per_block(w13, pow2=pow2))
        self._replace("w2", stable_per_block(w2, pow2=pow2))
        return self

    def _replace(self, name: str, w: FP8Tensor) -> None:
        """Buffers with the bits of w in place of the present ones, without a copy."""
        setattr(self, f"{name}_data", w.data.view(torch.uint8))
        setattr(self, f"{name}_scale", w.scale.view(torch.int32))
        if self.keep_transpose:
            w_t = transpose_per_block(w)
            setattr(self, f"{name}_t_data", w_t.data.view(torch.uint8))
            setattr(self, f"{name}_t_scale", w_t.scale.view(torch.int32))

    def set_weights(self, w13: FP8Tensor, w2: FP8Tensor) -> None:
        """Take over FP8 weights as they are: the tensors themselves, not copies.

        Args:
            w13: per_block data (E, 2I, H), scale (E, 2I/128, H/128), contiguous.
            w2: data (E, H, I), scale (E, H/128, I/128).

        Raises: ValueError for other shapes, dtypes or strides, before anything changes.
        """
        for name, new in zip(_WEIGHTS, (w13, w2), strict=True):
            for part, got, old in zip(FP8Tensor._fields, new, self._fp8(name), strict=True):
                if got.shape != old.shape or got.dtype != old.dtype or not got.is_contiguous():
                    raise ValueError(
                        f"{name}.{part}: expected contiguous {old.dtype} {tuple(old.shape)}, got "
                        f"{got.dtype} {tuple(got.shape)} with strides {got.stride()}"
                    )
        self._replace("w13", w13)
        self._replace("w2", w2)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.keep_transpose:
            for name in _WEIGHTS:
                self._replace(name, self._fp8(name))

    def add_lora(
        self,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Trainable updates of rank `rank` for w13 and w2; they start as nothing.

        Args:
            rank, alpha, dropout, dtype: see LowRankUpdate.

        Raises: ValueError naming the argument; RuntimeError if there are updates already.
        """
        if self.w13_lora is not None:
            raise RuntimeError(
                "these experts have low-rank updates already: merge_adapters() first"
            )
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        device = self.w13_data.device
        check_lora(rank, alpha, dropout, dtype)
        self.w13_lora = LowRankUpdate(
            e, 2 * i, h, rank, alpha, dropout=dropout, device=device, dtype=dtype
        )
        self.w2_lora = LowRankUpdate(
            e, h, i, rank, alpha, dropout=dropout, device=device, dtype=dtype
        )
        self.w13_lora.train(self.training)
        self.w2_lora.train(self.training)

    def updates(self) -> dict[str, LowRankUpdate]:
        """The low-rank updates by the name of their weight; empty without any."""
        pairs = (("w13", self.w13_lora), ("w2", self.w2_lora))
        return {name: update for name, update in pairs if update is not None}

    def expert_weight(self, name: str, expert: int) -> torch.Tensor:
        """Weight "w13" or "w2" of one expert with its update, float32: w[e] + s B[e] A[e]."""
        w = self._fp8(name)
        full = dequantize(FP8Tensor(w.data[expert], w.scale[expert]))
        update = self.updates().get(name)
        return full if update is None else full.add_(update.delta(expert))

    @torch.no_grad()
    def merge_adapters(self) -> None:
        """w = fp8(w + s B A), and the updates are gone. Without updates nothing changes.

        The sum is rounded to FP8: what the updates changed by less than half a unit of the last
        place stays as it was. Merging into `to_experts()` loses nothing.
        """
        for name in self.updates():
            w, pow2 = self._fp8(name), self.config.pow2_weight_scales
            merged = FP8Tensor(torch.empty_like(w.data), torch.empty_like(w.scale))
            for e in range(self.num_experts):
                one = stable_per_block(self.expert_weight(name, e), pow2=pow2)
                merged.data[e].copy_(one.data)
                merged.scale[e].copy_(one.scale)
            self._replace(name, merged)
        self.w13_lora = self.w2_lora = None

    @torch.no_grad()
    def to_experts(self, dtype: torch.dtype = torch.bfloat16) -> Experts:
        """Trainable Experts of this dtype with the same weights, updates merged."""
        sizes = (self.num_experts, self.hidden_size, self.intermediate_size)
        experts = Experts(*sizes, config=self.config, device="meta", dtype=dtype)
        for name in _WEIGHTS:
            w = torch.empty(self._fp8(name).data.shape, dtype=dtype, device=self.w13_data.device)
            for e in range(self.num_experts):
                w[e].copy_(self.expert_weight(name, e))
            setattr(experts, name, nn.Parameter(w))
        return experts.train(self.training)

    def forward(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        kept = self.keep_transpose
        return frozen_swiglu_experts(
            x_TH,
            topk_ids_TK,
            topk_weights_TK,
            self.w13,
            self.w2,
            w13_t=self._fp8("w13_t") if kept else None,
            w2_t=self._fp8("w2_t") if kept else None,
            low_rank13=None if self.w13_lora is None else self.w13_lora.low_rank(),
            low_rank2=None if self.w2_lora is None else self.w2_lora.low_rank(),
            config=self.config,
        )

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, keep_transpose={self.keep_transpose}"
        )
