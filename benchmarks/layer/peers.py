"""Expert layers of other libraries, for machines that have them installed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from benchmarks.layer.contenders import Layer, ToRows, fused_swiglu


def _sonicmoe() -> Layer:
    """SonicMoE 0.1.2, BF16. It takes the rows of w13 as alternating gate and up."""
    functional = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def layer(
        x: torch.Tensor,
        ids: torch.Tensor,
        probs: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
    ) -> torch.Tensor:
        tokens, topk = ids.shape
        token = torch.arange(tokens, device=x.device, dtype=torch.int32).repeat_interleave(topk)
        return functional.moe_general_routing_inputs(
            x, probs.flatten(), token, ids.flatten().int(),
            w13.permute(1, 2, 0), None, w2.permute(1, 2, 0), None,
            w2.shape[0], torch.cuda.current_stream().cuda_stream, swiglu,
        )[0]  # fmt: skip

    return layer


def _torchao() -> Layer:
    """torchao 0.18, FP8 rowwise, which wants groups of a multiple of 16 rows."""
    module = importlib.import_module("torchao.prototype.moe_training.fp8_grouped_mm")
    name = "_to_fp8_rowwise_then_scaled_grouped_mm"  # what its weight wrapper calls
    return padded_layer(getattr(module, name), 16)


def _transformer_engine() -> Layer:
    """TransformerEngine 2, FP8 block scales. It reads the group sizes on the host, and casts the
    weights in every step."""
    te = importlib.import_module("transformer_engine.pytorch")
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()

    @functools.cache
    def linear(experts: int, k: int, n: int) -> torch.nn.Module:
        return te.GroupedLinear(experts, k, n, bias=False, params_dtype=torch.bfloat16)

    def grouped_mm(
        rows: torch.Tensor,
        w: torch.Tensor,
        *,
        offs: torch.Tensor,
        pad_token_groups_for_grouped_mm: bool,
    ) -> torch.Tensor:
        sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
        # Its parameters, one an expert, are replaced by those of the layer.
        weights = {f"weight{i}": one for i, one in enumerate(w.transpose(1, 2).unbind())}
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return torch.func.functional_call(linear(*w.shape), weights, (rows, sizes))

    return padded_layer(grouped_mm, 16)


def padded_layer(grouped_mm: Callable[..., torch.Tensor], unit: int) -> Layer:
    """The torch BF16 layer with every group padded to a multiple of `unit` rows.

    A padding row repeats token 0; nothing reads its output, so its gradient is zero.

    Args:
        grouped_mm: (rows (R, K), weights (E, K, N), offs=(E,) int32,
            pad_token_groups_for_grouped_mm=False) to (R, N).
    """

    def layer(
        x: torch.Tensor,
        ids: torch.Tensor,
        probs: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
    ) -> torch.Tensor:
        flat, topk, experts = ids.flatten(), ids.shape[1], w2.shape[0]
        order = flat.argsort(stable=True)
        by_expert = flat[order]
        each = torch.arange(experts, device=flat.device)
        ends = torch.searchsorted(by_expert, each, right=True)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        padded_ends = ((sizes + unit - 1) // unit * unit).cumsum(0)
        shift = (padded_ends - (sizes + unit - 1) // unit * unit) - (ends - sizes)
        row_of_slot = torch.empty_like(order)
        row_of_slot[order] = torch.arange(order.numel(), device=order.device) + shift[by_expert]
        token_of_row = order.new_zeros((order.numel() + (unit - 1) * experts) // unit * unit)
        token_of_row[row_of_slot] = torch.arange(order.numel(), device=order.device) // topk
        # What the worst case leaves over goes to the last expert: rows in no group have no values.
        padded_ends[-1] = token_of_row.numel()
        options = {
            "offs": padded_ends.to(torch.int32),
            "pad_token_groups_for_grouped_mm": False,
        }
        rows = ToRows.apply(x, token_of_row, row_of_slot, topk)
        h = grouped_mm(rows, w13.transpose(1, 2), **options)
        a = fused_swiglu(x.device.type)(h)
        y = grouped_mm(a, w2.transpose(1, 2), **options)
        y = y.index_select(0, row_of_slot).view(*ids.shape, -1)
        return (y * probs.to(y.dtype).unsqueeze(-1)).sum(dim=1)

    return layer


PEERS: dict[str, Callable[[], Layer]] = {
    "sonicmoe": _sonicmoe,
    "torchao fp8 rowwise": _torchao,
    "transformer engine fp8": _transformer_engine,
}


def load(name: str) -> Layer:
    """The layer of a peer.

    Raises: RuntimeError when its library is not installed or lacks what the layer needs.
    """
    try:
        return PEERS[name]()
    except (ImportError, AttributeError) as error:  # not there, or another version
        raise RuntimeError(
            f"peer {name}: expected its library, with what the layer calls ({error})"
        ) from error
