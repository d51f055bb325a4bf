"""Checks of what users pass to this package's functions, before anything runs or is written."""

from __future__ import annotations

import torch

from fp8moe.config import FP8Config
from fp8moe.functional.main_grad import check_main_grad
from fp8moe.kernels.arguments import check_multiple, check_tensor
from fp8moe.kernels.routing import ID_DTYPES

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _check_weight(
    name: str, w: torch.Tensor, shape: tuple[int | str, ...], device: torch.device
) -> None:
    check_tensor(name, w, shape, FLOATS, device)
    check_main_grad(name, w)


def check_config(config: object) -> None:
    """Raise ValueError unless `config` is an FP8Config."""
    if not isinstance(config, FP8Config):
        raise ValueError(f"config: expected an FP8Config, got {config!r}")


def check_some(name: str, size: int) -> None:
    """Raise ValueError unless `size` is at least 1."""
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")


def size_unit(config: FP8Config) -> int:
    """What H and I must be multiples of, for the GEMMs that `config` chooses."""
    # 16 bytes: what TMA, and the 16-byte loads of the row kernels, need at the start of a row.
    return 16 if config.any_fp8 else 8


def check_size(name: str, size: int, config: FP8Config) -> None:
    """Raise ValueError unless the GEMMs that `config` chooses take a dimension of `size`."""
    check_some(name, size)
    check_multiple(f"{name}, in FP8" if config.any_fp8 else name, size, size_unit(config))


def check_grouped_linear(
    x: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor, config: FP8Config
) -> None:
    """Raises: ValueError for arguments that `grouped_linear` cannot take."""
    check_config(config)
    check_tensor("x", x, ("R", "K"), FLOATS, contiguous=False)
    _check_weight("w", w, ("E", "N", x.shape[1]), x.device)
    check_tensor("group_ends", group_ends, (w.shape[0],), (torch.int32,), x.device, False)
    check_some("w: E", w.shape[0])
    check_size("w: N", w.shape[1], config)
    check_size("x: K", x.shape[1], config)


def check_tokens(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, config: FP8Config
) -> None:
    """Raises: ValueError for tokens that an expert layer cannot take."""
    check_config(config)
    check_tensor("x", x, ("T", "H"), FLOATS, contiguous=False)
    check_tensor("topk_ids", topk_ids, (x.shape[0], "K"), ID_DTYPES, x.device, False)
    check_tensor("topk_weights", topk_weights, tuple(topk_ids.shape), FLOATS, x.device, False)
    check_some("topk_ids: K", topk_ids.shape[1])
    check_size("x: H", x.shape[1], config)


def check_weights(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, config: FP8Config) -> None:
    """Raises: ValueError for weights that do not fit x (T, H) or the GEMMs of config."""
    _check_weight("w2", w2, ("E", x.shape[1], "I"), x.device)
    _check_weight("w13", w13, (w2.shape[0], 2 * w2.shape[2], x.shape[1]), x.device)
    check_some("w2: E", w2.shape[0])
    check_size("w2: I", w2.shape[2], config)


def check_swiglu_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    config: FP8Config,
) -> None:
    """Raises: ValueError for arguments that `swiglu_experts` cannot take."""
    check_tokens(x, topk_ids, topk_weights, config)
    check_weights(x, w13, w2, config)
