"""What a run is asked to do, checked before DeepSpeed starts or anything is written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pretrain.config import Config, UserError, setting
from ..pretrain.presets import has_hopper

SETTINGS = "settings.json"
FREE = ("steps", "experts", "checkpoint_every", "log_every")
"""Options that a resumed run may change."""

EXPERTS = ("fp8", "bf16", "deepspeed")


@dataclass(frozen=True)
class Options:
    """The options of the command line; the DeepSpeed configuration has the rest."""

    experts: str = setting(
        "fp8", "fp8 or bf16: grouped, by fp8moe; deepspeed: DeepSpeed's own loop in BF16"
    )
    ep_size: int = setting(1, "processes that share one set of experts")
    layers: int = setting(2, "transformer layers, each with a mixture of experts")
    d_model: int = setting(128, "width of the model (H)")
    heads: int = setting(4, "attention heads")
    num_experts: int = setting(4, "experts per layer (E)")
    top_k: int = setting(2, "experts that a token goes to (K)")
    d_expert: int = setting(128, "inner width of an expert (I)")
    seq_len: int = setting(128, "tokens in a sequence")
    capacity_factor: float = setting(
        1.25, "places of an expert, over those it needs if all get as many; 0: no token is dropped"
    )
    balance_loss: float = setting(0.01, "weight of the load-balancing loss")
    steps: int = setting(20, "optimizer steps")
    eval_batches: int = setting(4, "batches of a validation")
    log_every: int = setting(5, "steps between two lines of progress")
    checkpoint_every: int = setting(
        10, "steps between two checkpoints, and one after the last; 0: none at all"
    )
    seed: int = setting(0, "seed of weights and data order")
    data: str | None = setting(None, "file or folder of text; default: the .py files of torch")
    pattern: str | None = setting(None, "glob that file names of a folder must match")

    def check(self, world_size: int) -> None:
        """Raises: UserError for options that no run on `world_size` processes can have."""
        if self.experts not in EXPERTS:
            raise UserError(f"--experts: expected {' or '.join(EXPERTS)}, got {self.experts}")
        for total, text in ((self.num_experts, "--num-experts"), (world_size, "processes")):
            if self.ep_size < 1 or total % self.ep_size:
                raise UserError(
                    f"--ep-size: expected a divisor of the {total} {text}, got {self.ep_size}"
                )
        if self.checkpoint_every < 0:
            raise UserError(
                f"--checkpoint-every: expected 0 (none) or more, got {self.checkpoint_every}"
            )
        if not 0 <= self.capacity_factor < float("inf"):
            raise UserError(f"--capacity-factor: expected 0 or more, got {self.capacity_factor}")

    def shape(self, device: str, micro_batch: int, micro_batches: int) -> Config:
        """The same model and text as the other recipe's configuration. Raises: UserError."""
        config = Config(
            device=device,
            layers=self.layers,
            d_model=self.d_model,
            heads=self.heads,
            experts=self.num_experts,
            top_k=self.top_k,
            d_expert=self.d_expert,
            seq_len=self.seq_len,
            batch_size=micro_batch,
            grad_accumulation=micro_batches,
            steps=self.steps,
            warmup_steps=0,
            eval_batches=self.eval_batches,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every or self.steps,
            balance_loss=self.balance_loss,
            seed=self.seed,
            data=self.data,
            pattern=self.pattern,
        )
        config.check()
        return config


H100 = Options(
    layers=6,
    d_model=1024,
    heads=8,
    num_experts=16,
    d_expert=1536,
    seq_len=1024,
    steps=1000,
    eval_batches=4,
    log_every=20,
    checkpoint_every=500,
)
PRESETS = {"cpu": Options(), "h100": H100}


def _defaults(name: str) -> str:
    values = {preset: getattr(options, name) for preset, options in PRESETS.items()}
    if None in values.values():
        return ""
    if len(set(values.values())) == 1:
        return f"; default: {values['cpu']}"
    return f"; default: {', '.join(f'{value} ({preset})' for preset, value in values.items())}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m recipes.deepspeed_moe",
        description="Trains a small mixture-of-experts language model on bytes of text with "
        "DeepSpeed, its experts replaced by grouped FP8 ones. Also starts under torchrun and "
        "DeepSpeed's launcher.",
    )
    top.add_argument("--preset", choices=PRESETS, help="default: h100 on a Hopper GPU, else cpu")
    top.add_argument("--deepspeed-config", type=Path, help="JSON; default: that of the preset")
    top.add_argument("--zero-stage", type=int, choices=(0, 1, 2), help="in place of the JSON's")
    top.add_argument("--out", type=Path, required=True, help="folder of the run")
    top.add_argument("--resume", action="store_true", help="go on from its last checkpoint")
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    types = {"int": int, "float": float}
    for item in dataclasses.fields(Options):
        top.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=types.get(str(item.type), str),
            default=argparse.SUPPRESS,
            help=item.metadata["help"] + _defaults(item.name),
        )
    return top


@dataclass(frozen=True)
class Request:
    """A checked command line."""

    options: Options
    deepspeed: dict[str, Any]
    out: Path
    resume: bool
    world_size: int

    def settings(self) -> dict[str, Any]:
        """What a run is, for a later one that wants to go on with it."""
        return {
            "options": dataclasses.asdict(self.options),
            "deepspeed": self.deepspeed,
            "world_size": self.world_size,
        }


def read(argv: Sequence[str] | None) -> Request:
    """The request of a command line. Raises: UserError."""
    values = vars(parser().parse_args(argv))
    preset = values["preset"] or ("h100" if has_hopper() else "cpu")
    names = {item.name for item in dataclasses.fields(Options)}
    options = dataclasses.replace(
        PRESETS[preset], **{name: value for name, value in values.items() if name in names}
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    options.check(world_size)
    path = values["deepspeed_config"] or Path(__file__).with_name(f"{preset}.json")
    deepspeed = _deepspeed_config(path, options, values["zero_stage"])
    request = Request(options, deepspeed, values["out"], values["resume"], world_size)
    _check_folder(request)
    return request


def _deepspeed_config(path: Path, options: Options, stage: int | None) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed-config: cannot read {path}: {error}") from error
    for key, default in (
        ("train_micro_batch_size_per_gpu", None),
        ("gradient_accumulation_steps", 1),
    ):
        value = config.setdefault(key, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {key}: expected a number of 1 or more, got {value!r}")
    if not config.get("bf16", {}).get("enabled"):
        raise UserError(
            f'{path}: expected "bf16": {{"enabled": true}}, the precision around experts'
        )
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if stage is not None:
        zero["stage"] = stage
    if zero.get("stage", 0) not in (0, 1, 2):
        raise UserError(
            f"{path}: zero_optimization.stage: expected 0, 1 or 2, which DeepSpeed's MoE layers "
            f"work with, got {zero['stage']}"
        )
    if zero.get("stage", 0) == 0 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise UserError(
            f"{path}: data_types.grad_accum_dtype: expected bf16 with ZeRO stage 0, where "
            "DeepSpeed has no other, got fp32"
        )
    return config


def _check_folder(request: Request) -> None:
    file = request.out / SETTINGS
    if not request.resume:
        if request.out.exists() and any(request.out.iterdir()):
            raise UserError(
                f"--out: {request.out} is not empty; go on with --resume, or name another"
            )
        return
    if not file.is_file():
        raise UserError(f"--resume: no run in {request.out} ({SETTINGS} is missing)")
    old, new = json.loads(file.read_text(encoding="utf-8")), request.settings()
    pairs = [(k, old[k], new[k]) for k in ("world_size", "deepspeed")]
    pairs += [
        (f"--{k.replace('_', '-')}", old["options"].get(k), v)
        for k, v in new["options"].items()
        if k not in FREE
    ]
    for name, was, now in pairs:
        if was != now:
            raise UserError(f"--resume: {name}: expected {was} as in {file}, got {now}")
    # Grouped experts and DeepSpeed's own have other parameters, and so other optimizer states.
    kinds = [
        experts == "deepspeed" for experts in (old["options"]["experts"], request.options.experts)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"--resume: --experts: expected {old['options']['experts']} as in {file}, got "
            f"{request.options.experts}; fp8 and bf16 may be exchanged, deepspeed may not"
        )
