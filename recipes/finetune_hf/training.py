"""One training run with the Trainer: loss before and after, tokens per second, peak memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from recipes.pretrain.clock import resident_bytes

from .data import Text
from .settings import Settings

_UNTIMED_STEPS = 5  # kernels are compiled and memory is allocated in the first ones


@dataclass
class Result:
    """What a run measured.

    Args:
        loss_before, loss_after: nats a token on the held-out windows.
        losses: (step, training loss) every `log_every` steps.
        tokens_per_s: without the first steps.
        peak_memory_bytes: CUDA: allocated by torch. CPU: resident memory of the process.
    """

    loss_before: float = 0.0
    loss_after: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    tokens_per_s: float = 0.0
    peak_memory_bytes: int = 0


class _Meter(TrainerCallback):
    """Times steps and notes memory and losses, without making the device wait in between."""

    def __init__(self, settings: Settings, result: Result, log: Callable[[str], None]) -> None:
        self.settings, self.result, self.log = settings, result, log
        self.untimed = min(_UNTIMED_STEPS, settings.steps - 1)
        self.begin = 0.0

    def _now(self) -> float:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self.untimed == 0:
            self.begin = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.settings.device == "cpu":
            self.result.peak_memory_bytes = max(self.result.peak_memory_bytes, resident_bytes())
        if state.global_step == self.untimed:
            self.begin = self._now()
        if state.global_step == self.settings.steps:
            steps = self.settings.steps - self.untimed
            seconds = self._now() - self.begin
            self.result.tokens_per_s = steps * self.settings.tokens_per_step / seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self.result.losses.append((state.global_step, loss))
            self.log(f"step {state.global_step:>4}/{self.settings.steps}  loss {loss:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.settings.device == "cuda":
            self.result.peak_memory_bytes = torch.cuda.max_memory_allocated()


def _arguments(settings: Settings, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.1,
        adam_beta2=0.95,
        # Master weights in FP32 compute in BF16 on a GPU; BF16 weights do anyway.
        bf16=settings.device == "cuda" and settings.dtype == "float32",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=settings.log_every,
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        disable_tqdm=True,
        dataloader_pin_memory=settings.device == "cuda",
        prediction_loss_only=True,
    )


def train(model: Any, text: Text, settings: Settings, log: Callable[[str], None]) -> Result:
    """Trains the model in place.

    Args:
        log: takes a line of progress.
    """
    result = Result()
    with tempfile.TemporaryDirectory() as folder:  # the Trainer wants one; nothing goes there
        trainer = Trainer(
            model=model,
            args=_arguments(settings, folder),
            train_dataset=text.train,
            eval_dataset=text.valid,
            callbacks=[_Meter(settings, result, log)],
        )
        trainer.remove_callback(PrinterCallback)
        result.loss_before = float(trainer.evaluate()["eval_loss"])
        log(f"held-out loss before {result.loss_before:.4f}")
        trainer.train()
        result.loss_after = float(trainer.evaluate()["eval_loss"])
        log(f"held-out loss after {result.loss_after:.4f}")
    return result
