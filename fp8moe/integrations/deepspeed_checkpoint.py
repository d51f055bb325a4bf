"""Whether a DeepSpeed checkpoint fits an engine, told before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def check_deepspeed_checkpoint(engine: Any, load_dir: str | Path, tag: str | None = None) -> None:
    """Raise unless `engine.load_checkpoint(load_dir, tag)` can restore the optimizer's states.

    Call it before that. DeepSpeed compares the world size only after it has overwritten the
    weights, and the parameters not at all: the flat buffers of ZeRO have the same size with and
    without replaced experts, in another order, and would be loaded scrambled. A checkpoint
    that is refused here still gives its weights, per expert, to
    `engine.load_checkpoint(..., load_optimizer_states=False)`.

    Args:
        engine: of `deepspeed.initialize`.
        load_dir, tag: as of `engine.load_checkpoint`; a tag of None is the one in `latest`.

    Raises:
        ValueError: no such checkpoint; another number of data-parallel processes; other names,
            shapes or groups of parameters (another ep_size, experts replaced in one of both).
    """
    load_dir = Path(load_dir)
    if tag is None:
        latest = load_dir / "latest"
        if not latest.is_file():
            raise ValueError(
                f"load_dir: expected a checkpoint folder with a file 'latest', got {load_dir}"
            )
        tag = latest.read_text(encoding="utf-8").strip()
    saved = _load_file(engine._get_ckpt_name(str(load_dir), tag))
    world = engine.seq_dp_world_size
    if saved["dp_world_size"] != world:
        raise ValueError(
            f"{load_dir / tag}: expected a checkpoint of {world} data-parallel processes, "
            f"got one of {saved['dp_world_size']}"
        )
    if engine.optimizer is None:
        return
    if engine.zero_optimization():
        ours, theirs = engine._get_zero_param_shapes(), saved["param_shapes"]
    else:
        ours = [[tuple(p.shape) for p in g["params"]] for g in engine.basic_optimizer.param_groups]
        theirs = _optimizer_shapes(engine, load_dir, tag, saved)
    if ours != theirs:
        raise ValueError(
            f"{load_dir / tag}: expected optimizer states of {_differing(ours, theirs)}, got those "
            f"of {_differing(theirs, ours)}; load its weights with load_optimizer_states=False, "
            "or start with the same experts and ep_size as the run that wrote it"
        )


def _load_file(path: str) -> Any:
    if not Path(path).is_file():
        raise ValueError(
            f"load_dir: expected a checkpoint of this parallel layout, found no {path}"
        )
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _optimizer_shapes(engine: Any, load_dir: Path, tag: str, saved: Any) -> Any:
    """Shapes of the parameters in each group of an optimizer that ZeRO does not partition."""
    if engine.has_moe_layers:
        from deepspeed.utils import groups

        rank = groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
        saved = _load_file(engine._get_optimizer_ckpt_name(str(load_dir), tag, rank))
    states = saved["optimizer"]
    states = states.get("optimizer_state_dict", states)

    def shape(i: int) -> tuple[int, ...] | None:
        tensors = [t for t in states["state"].get(i, {}).values() if torch.is_tensor(t)]
        return next((tuple(t.shape) for t in tensors if t.dim()), None)

    return [[shape(i) for i in group["params"]] for group in states["param_groups"]]


def _differing(groups: Any, others: Any) -> str:
    """Names and shapes that groups have and others do not (all, if only their order differs)."""

    def flat(groups: Any) -> list[str]:
        return [
            f"{n} {tuple(g[n])}" if isinstance(g, dict) else str(n) for g in groups or () for n in g
        ]

    rest = [item for item in flat(groups) if item not in flat(others)] or flat(groups)
    return ", ".join(rest[:4]) + (", ..." if len(rest) > 4 else "")
