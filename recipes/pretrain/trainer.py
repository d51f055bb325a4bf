"""The training loop: both twins, step by step, on the same batches."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoint
from .config import Config
from .data import Corpus, Loader
from .metrics import VALID, Metrics
from .parallel import Ranks
from .stop import StopRequest
from .twin import Twin


class Trainer:
    """The twins of a run and where they are in the data."""

    def __init__(self, config: Config, corpus: Corpus, ranks: Ranks | None = None):
        self.config = config
        self.ranks = ranks or Ranks()
        self.device = torch.device(config.device)
        self.loader = Loader(corpus, config, self.ranks)
        self.twins = [Twin(name, config, self.ranks) for name in config.twins]
        self.step = 0  # steps done; also the position in the data

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Puts weights, optimizers, random state and position back to those of a checkpoint."""
        for twin in self.twins:
            twin.restore(saved)
        checkpoint.restore_random_state(self.device, saved.tensors("random"))
        self.step = saved.state["step"]

    def save(self, folder: Path, metrics: Metrics) -> None:
        """Writes a checkpoint that ``restore`` continues from bit for bit."""
        for twin in self.twins:
            twin.flush(metrics)
        tensors = {"random": checkpoint.random_state(self.device)}
        for twin in self.twins:
            tensors |= twin.tensors()
        state = {
            "metrics_bytes": metrics.offset(),
            "skipped": {twin.name: twin.skipped for twin in self.twins},
        }
        if self.ranks.first:
            checkpoint.save(folder, self.step, tensors, state, self.config.keep)
        self.ranks.wait()

    def train(self, folder: Path, metrics: Metrics, stop: StopRequest) -> bool:
        """Trains until the last step or a request to stop, then saves.

        Returns:
            Whether the last step was done.

        Raises:
            Diverged: a twin's gradients stay not finite. The last checkpoint is from before.
        """
        config = self.config
        saved_at = self.step
        # In a log file, where no line can be overwritten, a line every now and then is enough.
        interval = 0.5 if sys.stderr.isatty() else 20.0
        with tqdm(
            total=config.steps, initial=self.step, desc="training", unit="step", smoothing=0.05,
            dynamic_ncols=True, mininterval=interval, maxinterval=2 * interval,
            disable=not self.ranks.first,
        ) as bar:  # fmt: skip
            while self.step < config.steps and not self.ranks.any(stop.signal is not None):
                self._one_step()
                bar.update()
                done = self.step == config.steps
                if done or self.step % config.log_every == 0:
                    self._show(bar, metrics)
                if done or self.step % config.eval_every == 0:
                    self._validate(metrics)
                every = config.checkpoint_every
                if every > 0 and (done or self.step % every == 0):
                    self.save(folder, metrics)
                    saved_at = self.step
        finished = self.step == config.steps
        if self.step != saved_at and not finished:
            self.save(folder, metrics)
        return finished

    def _one_step(self) -> None:
        every = self.config.observe_every
        observe = every > 0 and self.step % every == 0
        batches = self.loader.step(self.step)
        for twin in self.twins:
            twin.train_step(self.step, batches, observe)
        self.step += 1

    def _show(self, bar: tqdm, metrics: Metrics) -> None:
        shown = {}
        for twin in self.twins:
            latest = twin.flush(metrics)
            shown[twin.name] = f"{latest['loss']:.4f}"
            if "tokens_per_s" in latest:
                shown[f"{twin.name} tok/s"] = f"{latest['tokens_per_s']:,.0f}"
        metrics.flush()
        bar.set_postfix(shown, refresh=False)

    def _validate(self, metrics: Metrics) -> None:
        for twin in self.twins:
            loss = twin.validate(self.loader.validation())
            metrics.write(VALID, step=self.step, model=twin.name, loss=loss)
        metrics.flush()
