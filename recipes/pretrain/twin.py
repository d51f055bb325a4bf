"""One of the two models of a run: its steps, its measurements, its state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import fp8moe

from . import checkpoint
from .clock import StepMeter
from .config import Config
from .data import Batch, mixed_seed
from .metrics import LOAD, SPEED, TRAIN, VALUES, Metrics
from .model import LanguageModel
from .optimizer import ClippedAdamW, learning_rate
from .parallel import Ranks, whole
from .values import ValueCounter

_MAX_SKIPPED = 20  # updates in a row without a finite gradient before the run gives up


class Diverged(RuntimeError):
    """The gradients of a twin stay not finite."""


class Twin:
    """A model in one precision with its optimizer.

    Losses and norms stay on the device until ``flush``, so a step needs no synchronisation.
    """

    def __init__(self, name: str, config: Config, ranks: Ranks):
        self.name = name
        self.config = config
        self.ranks = ranks
        self.device = torch.device(config.device)
        # Twins draw the same weights.
        torch.manual_seed(mixed_seed("weights", config.seed))
        with self.device:
            self.model = LanguageModel(config, name, ranks.ep_group)
        if config.nudge:
            self.model.nudge(config.nudge)
        if config.compile:
            self.model.compile_parts()
        self._replica = ranks.replicate(self.model)
        self.optimizer = ClippedAdamW(self.model, config)
        self.meter = StepMeter(self.device)
        self._values = ValueCounter()
        self._pending: list[tuple[int, Tensor]] = []
        self._load = torch.zeros(
            config.layers, config.experts, dtype=torch.int64, device=self.device
        )
        self._skipped = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def train_step(self, step: int, batches: Iterable[Batch], observe: bool) -> None:
        """One optimizer step on the mean loss of the micro-batches."""
        # The same noise for both twins, whichever steps first.
        torch.manual_seed(mixed_seed("step", self.config.seed, step))
        watch = self._values.watch() if observe else contextlib.nullcontext()
        with self.meter.step(self._kept_bytes(), timed=not observe), watch:
            share = 1 / self.config.grad_accumulation
            total = torch.zeros(2, device=self.device)
            for batch in batches:
                with self.autocast():
                    loss, balance = self._replica(batch.tokens, batch.targets)
                self._load += self.model.expert_load()
                ((loss + balance) * share).backward()
                total += share * torch.stack([loss.detach(), balance.detach()])
            self.ranks.reduce_experts(self.model)
            total = self.ranks.sum(total / self.ranks.size)
            norm = self.optimizer.step(step)
            # All FP8 and BF16 copies of the weights are stale now.
            fp8moe.clear_weight_cache()
        self._pending.append((step, torch.cat([total, norm.reshape(1)])))

    def _kept_bytes(self) -> int:
        """Memory of the weights and, from the first step on, of the optimizer's moments."""
        parameters = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return parameters * (3 if self.optimizer.adamw.state else 1)

    # Not worth a second compilation, for no gradients and for other lengths.
    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over the batches, nats per byte."""
        self.model.eval()
        losses, weights = [], []
        for batch in batches:
            with self.autocast():
                losses.append(self.model(batch.tokens, batch.targets)[0])
            weights.append(batch.targets.numel())
        self.model.train()
        fp8moe.clear_weight_cache()
        values = torch.stack(losses).double().tolist()
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    def flush(self, metrics: Metrics) -> dict[str, float]:
        """Writes what was measured since the last flush; waits for the device.

        Returns:
            The last loss and the tokens per second, for the progress bar.

        Raises:
            Diverged: the last updates were all skipped because gradients were not finite.
        """
        if not self._pending:
            return {}
        rows = torch.stack([row for _, row in self._pending]).double().tolist()
        last = self._pending[-1][0]
        latest: dict[str, float] = {}
        for (step, _), (loss, balance, norm) in zip(self._pending, rows, strict=True):
            metrics.write(
                TRAIN, step=step, model=self.name, loss=loss, balance_loss=balance, grad_norm=norm,
                lr=learning_rate(self.config, step),
            )  # fmt: skip
            self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
            latest["loss"] = loss
        self._pending.clear()
        measured = self.meter.read()
        if measured is not None:
            step_ms, memory = measured
            latest["tokens_per_s"] = 1e3 * self.config.tokens_per_step / step_ms
            metrics.write(
                SPEED, step=last, model=self.name, step_ms=step_ms,
                tokens_per_s=latest["tokens_per_s"], memory_bytes=memory,
            )  # fmt: skip
        load = self.ranks.sum(self._load.double())
        shares = (load / load.sum(dim=1, keepdim=True)).tolist()
        metrics.write(LOAD, step=last, model=self.name, share=shares)
        self._load.zero_()
        values = self._values.shares()
        if values:
            metrics.write(VALUES, step=last, model=self.name, tensors=values)
        if self._skipped >= _MAX_SKIPPED:
            raise Diverged(
                f"{self.name}: the last {self._skipped} gradient norms up to step {last} are not "
                "finite; a smaller --lr or more --warmup-steps may help"
            )
        return latest

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of this twin, as {file: tensors}."""
        return {
            f"{self.name}.model": whole(self.model.state_dict()),
            f"{self.name}.optimizer": checkpoint.optimizer_tensors(
                self.model, self.optimizer.adamw
            ),
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Undoes ``tensors``."""
        set_model_state_dict(
            self.model,
            dict(saved.tensors(f"{self.name}.model")),
            options=StateDictOptions(full_state_dict=True),
        )
        checkpoint.load_optimizer(
            self.model, self.optimizer.adamw, saved.tensors(f"{self.name}.optimizer")
        )
        self._skipped = saved.state["skipped"][self.name]

    @property
    def skipped(self) -> int:
        """Updates skipped in a row up to now."""
        return self._skipped
