"""Hyperparameters of a run: the presets, the checks, and what they cost in parameters and FLOPs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from fp8moe.config import Save

VOCABULARY = 256  # one token per byte value


class UserError(ValueError):
    """A request that cannot be carried out: printed without a traceback, nothing written."""


def setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that the command line has as an option, with this help."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run: equal configs and data, equal runs."""

    model: str = setting("both", "which twins to train", ("both", "fp8", "bf16"))
    device: str = setting("cpu", "where to train", ("cpu", "cuda"))
    seed: int = setting(0, "seed of the weights, of the data order and of the text samples")

    data: str | None = setting(None, "file or folder of text; default: .py files of torch")
    pattern: str | None = setting(None, "glob that file names of a folder must match")
    valid_fraction: float = setting(0.02, "share of the bytes held out for validation, by file")

    layers: int = setting(3, "transformer layers, each with a mixture of experts")
    d_model: int = setting(256, "width of the model (H)")
    heads: int = setting(4, "attention heads")
    experts: int = setting(8, "experts per layer (E)")
    top_k: int = setting(2, "experts that a token goes to (K)")
    d_expert: int = setting(128, "inner width of an expert (I)")

    seq_len: int = setting(256, "tokens in a sequence")
    batch_size: int = setting(8, "sequences in a micro-batch")
    grad_accumulation: int = setting(1, "micro-batches in a step")
    steps: int = setting(450, "optimizer steps")

    ep: int = setting(1, "processes that share the batches and the experts (see parallel.py)")

    nudge: float = setting(0.0, "relative error of the first weights: shows what chance does")
    lr: float = setting(1e-3, "peak learning rate")
    min_lr: float = setting(0.1, "last learning rate, as a share of the peak")
    warmup_steps: int = setting(45, "steps of linear warm-up before the cosine")
    weight_decay: float = setting(0.1, "AdamW weight decay of the matrices")
    beta1: float = setting(0.9, "AdamW beta 1")
    beta2: float = setting(0.95, "AdamW beta 2")
    clip: float = setting(1.0, "largest gradient norm")
    balance_loss: float = setting(0.01, "weight of the load-balancing loss")
    z_loss: float = setting(0.001, "weight of the router's z-loss")

    pow2_scales: bool = setting(True, "round FP8 scales, of weights too, up to powers of two")
    fp8_gemms: str = setting(
        "all", "which GEMMs the FP8 model has in FP8", ("all", "fprop", "dgrad", "wgrad")
    )
    save: Save = setting("bf16", "what FP8 experts keep for backward", ("bf16", "fp8", "recompute"))

    compile: bool = setting(False, "torch.compile around the FP8 experts (see the README)")

    log_every: int = setting(5, "steps between two reads of the device's metrics")
    eval_every: int = setting(50, "steps between two validations")
    eval_batches: int = setting(8, "micro-batches in a validation")
    observe_every: int = setting(25, "steps between two looks at FP8 values; 0: never")
    checkpoint_every: int = setting(100, "steps between two checkpoints; 0: only at a stop")
    keep: int = setting(2, "checkpoints to keep")
    sample_bytes: int = setting(200, "bytes of text to write at the end; 0: none")
    temperature: float = setting(0.7, "temperature of that text")

    @property
    def twins(self) -> tuple[str, ...]:
        """Names of the models that this run trains, in the order in which they take a step."""
        return ("bf16", "fp8") if self.model == "both" else (self.model,)

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    @property
    def attention_parameters(self) -> int:
        """Parameters outside the experts: embedding, attention, routers, norms."""
        layer = 4 * self.d_model**2 + self.experts * self.d_model + 2 * self.d_model
        return self.layers * layer + VOCABULARY * self.d_model + self.d_model

    @property
    def expert_parameters(self) -> int:
        return self.layers * self.experts * 3 * self.d_model * self.d_expert

    @property
    def parameters(self) -> int:
        return self.attention_parameters + self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        return self.attention_parameters + self.expert_parameters * self.top_k // self.experts

    @property
    def flops_per_step(self) -> int:
        """6 FLOP per active parameter and token, and the causal half of attention's products."""
        attention = 6 * self.layers * self.seq_len * self.d_model
        return self.tokens_per_step * (6 * self.active_parameters + attention)

    @property
    def expert_flops_per_step(self) -> int:
        """18 R H I a layer: the part that the FP8 twin does in FP8."""
        rows = self.tokens_per_step * self.top_k
        return 18 * self.layers * rows * self.d_model * self.d_expert

    def check(self) -> None:
        """Raises UserError for a value that no run can have."""
        for names, least, text in (
            (_POSITIVE, math.ulp(0.0), "more than 0"),
            (_NOT_NEGATIVE, 0, "0 or more"),
        ):
            for name in names:
                value = getattr(self, name)
                if not least <= value < math.inf:  # false for NaN too
                    raise UserError(f"--{option(name)}: expected {text}, got {value}")
        for item in dataclasses.fields(self):
            choices = item.metadata["choices"]
            if choices and getattr(self, item.name) not in choices:
                raise UserError(
                    f"--{option(item.name)}: expected one of {', '.join(choices)}, "
                    f"got {getattr(self, item.name)}"
                )
        if self.d_model % (2 * self.heads):
            raise UserError(
                f"--d-model: expected a multiple of twice --heads ({2 * self.heads}), "
                f"because rotary positions turn pairs of channels; got {self.d_model}"
            )
        for name in ("d_model", "d_expert"):
            if getattr(self, name) % 16:
                raise UserError(
                    f"--{option(name)}: expected a multiple of 16, which FP8 GEMMs need, "
                    f"got {getattr(self, name)}"
                )
        if self.top_k > self.experts:
            raise UserError(
                f"--top-k: expected at most --experts ({self.experts}), got {self.top_k}"
            )
        for name in ("experts", "batch_size"):
            if getattr(self, name) % self.ep:
                raise UserError(
                    f"--{option(name)}: expected a multiple of --ep ({self.ep}), "
                    f"got {getattr(self, name)}"
                )
        # Ranks draw fewer numbers for their experts, so the rest of the model would differ.
        for name in ("compile", "nudge"):
            if getattr(self, name) and self.ep > 1:
                raise UserError(f"--{name}: expected --ep 1, got {self.ep}")
        if self.warmup_steps >= self.steps:
            raise UserError(
                f"--warmup-steps: expected fewer than --steps ({self.steps}), "
                f"got {self.warmup_steps}"
            )
        if not 0 < self.valid_fraction <= 0.5:
            raise UserError(f"--valid-fraction: expected 0 to 0.5, got {self.valid_fraction}")
        if not 0 <= self.min_lr <= 1:
            raise UserError(f"--min-lr: expected 0 to 1 (a share of --lr), got {self.min_lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name}: expected 0 to 1, got {getattr(self, name)}")


_POSITIVE = (
    "layers", "d_model", "heads", "experts", "top_k", "d_expert", "seq_len", "batch_size",
    "grad_accumulation", "steps", "ep", "lr", "clip", "log_every", "eval_every", "eval_batches",
    "keep", "temperature",
)  # fmt: skip
_NOT_NEGATIVE = (
    "nudge", "warmup_steps", "weight_decay", "balance_loss", "z_loss", "observe_every",
    "sample_bytes", "checkpoint_every",
)  # fmt: skip


# Settings that a resumed run may change. The first two touch no number of the training; another
# number of processes only changes the order of sums.
FREE = ("checkpoint_every", "keep", "ep")


def option(name: str) -> str:
    """The command-line spelling of a field."""
    return name.replace("_", "-")


def load(values: dict[str, Any]) -> Config:
    """The Config written by ``dataclasses.asdict``; unknown names are an error."""
    known = {item.name for item in dataclasses.fields(Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"config.json: unknown settings {', '.join(unknown)}")
    return Config(**values)
