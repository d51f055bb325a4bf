"""The run: engine, steps, validation, checkpoints, and what is printed and written."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from fp8moe import FP8Config
from fp8moe.integrations.deepspeed import replace_deepspeed_experts
from fp8moe.integrations.deepspeed_checkpoint import check_deepspeed_checkpoint

from ..pretrain.clock import resident_bytes
from ..pretrain.config import Config, UserError
from ..pretrain.data import Batch, Corpus, Loader, load_corpus
from ..pretrain.run import check_same_data
from .model import LanguageModel
from .options import SETTINGS, Options, Request, read

WARM = 3  # steps that are not timed: kernels are compiled and buffers allocated in them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns: 0: done. 2: the request cannot be carried out, nothing was written.
    """
    try:
        request = read(argv)
        deepspeed = _import_deepspeed()
        config = _shape(request)
        corpus = load_corpus(config)
        loader = Loader(corpus, config)
        _check_text(request, corpus, loader)
        _start(deepspeed)
        rank = torch.distributed.get_rank()
        run = Run(request, config, rank)
        engine = _engine(deepspeed, request, config, rank)
        if request.resume:
            run.restore(engine)
        else:
            run.create(corpus.summary())
        run.train(engine, loader)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Not after an error: NCCL would wait here for processes that wait for this one.
    torch.distributed.destroy_process_group()
    return 0


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"expected DeepSpeed 0.19.8 or newer, pip install 'fp8moe[deepspeed]'; got {error}"
        ) from error
    return deepspeed


def _shape(request: Request) -> Config:
    """Model and text; a step's micro-batches are those of all processes together."""
    config = request.deepspeed
    micro_batches = config["gradient_accumulation_steps"] * request.world_size
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    return request.options.shape(
        device.split(":")[0], config["train_micro_batch_size_per_gpu"], micro_batches
    )


def _check_text(request: Request, corpus: Corpus, loader: Loader) -> None:
    if request.resume:
        check_same_data(json.loads((request.out / SETTINGS).read_text(encoding="utf-8")), corpus)
    batches = len(list(loader.validation()))
    if batches < request.world_size:
        raise UserError(
            f"--eval-batches: expected held-out text for {request.world_size} processes, "
            f"got {batches} micro-batches"
        )


def _start(deepspeed: Any) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)  # started as `python -m`, without a launcher
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    # An optional all-reduce for CPUs that a C++ compiler would have to build first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _engine(deepspeed: Any, request: Request, config: Config, rank: int) -> Any:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    model = LanguageModel(config, request.options, rank)
    if request.options.experts != "deepspeed":
        precision = FP8Config() if request.options.experts == "fp8" else FP8Config.bf16()
        replaced = replace_deepspeed_experts(model, config=precision)
        if rank == 0:
            for layer in replaced:
                _print(
                    f"{layer.name}: {layer.num_local_experts} experts of this process in "
                    f"{request.options.experts}, H {layer.hidden_size}, I {layer.intermediate_size}"
                )
    group = {"params": list(model.parameters()), "name": "all"}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(group),
        config=request.deepspeed,
    )
    return engine


class Run:
    """The folder of a run, and its loop."""

    def __init__(self, request: Request, config: Config, rank: int):
        self.request, self.config, self.rank = request, config, rank
        self.options: Options = request.options
        self.checkpoints = request.out / "checkpoints"
        self.metrics = request.out / "metrics.jsonl"
        self.first_loss: float | None = None
        self.checkpoint_seconds: list[float] = []

    def create(self, corpus: dict[str, Any]) -> None:
        torch.distributed.barrier()  # every process has looked at the folder by now
        if self.rank == 0:
            self.request.out.mkdir(parents=True, exist_ok=True)
            self._write(SETTINGS, self.request.settings() | {"data": corpus})
        torch.distributed.barrier()

    def restore(self, engine: Any) -> None:
        try:
            check_deepspeed_checkpoint(engine, self.checkpoints)
        except ValueError as error:
            raise UserError(f"--resume: {error}") from error
        _, client = engine.load_checkpoint(str(self.checkpoints))
        self.first_loss = client["first_loss"]
        if self.rank == 0 and self.metrics.exists():
            # What was written after the checkpoint is written again.
            os.truncate(self.metrics, client["metrics_bytes"])
        self._print(f"resumed at step {engine.global_steps}")

    def train(self, engine: Any, loader: Loader) -> None:
        """Steps from where the engine is to the last; validation before and after."""
        if self.first_loss is None:
            self.first_loss = self.validate(engine, loader)
            self._print(f"validation loss before: {self.first_loss:.4f} nats per byte")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begin = engine.global_steps
        times, memory = [], 0
        for step in range(begin, self.options.steps):
            started = time.perf_counter()
            loss, balance = self._step(engine, loader.step(step))
            logged = (step + 1) % self.options.log_every == 0 or step + 1 == self.options.steps
            if logged or step - begin + 1 == WARM:
                loss, balance = _mean(loss), _mean(balance)  # waits for the device
            times.append(time.perf_counter() - started)
            memory = max(memory, resident_bytes())
            if logged:
                rate = self.config.tokens_per_step / statistics.mean(
                    times[-self.options.log_every :]
                )
                self._print(
                    f"step {step + 1:5d}  loss {loss:.4f}  balance {balance:.3f}  "
                    f"lr {engine.get_lr()[0]:.2e}  {rate:,.0f} tokens/s"
                )
                self._record(step=step + 1, loss=loss, balance=balance, tokens_per_second=rate)
            self._save(engine, step + 1)
        self._finish(engine, loader, times[WARM:], memory)

    def _save(self, engine: Any, step: int) -> None:
        """A checkpoint, if it is time for one. What it takes is no part of a step's time."""
        every = self.options.checkpoint_every
        if every and (step % every == 0 or step == self.options.steps):
            started = time.perf_counter()
            written = self.metrics.stat().st_size if self.metrics.exists() else 0
            state = {"first_loss": self.first_loss, "metrics_bytes": written}
            engine.save_checkpoint(str(self.checkpoints), f"step_{step}", state)
            self.checkpoint_seconds.append(time.perf_counter() - started)

    def _step(self, engine: Any, batches: list[Batch]) -> tuple[Any, Any]:
        """One optimizer step on this process's share; the means of its losses, on the device."""
        losses, balances = [], []
        for batch in batches[self.rank :: self.request.world_size]:
            loss, balance = engine(batch.tokens, batch.targets)
            engine.backward(loss + self.options.balance_loss * balance)
            engine.step()
            losses.append(loss.detach())
            balances.append(balance.detach())
        return torch.stack(losses).mean(), torch.stack(balances).mean()

    def validate(self, engine: Any, loader: Loader) -> float:
        """Mean loss on the held-out text, the same number of micro-batches on each process."""
        world = self.request.world_size
        batches = list(loader.validation())
        mine = batches[: len(batches) // world * world][self.rank :: world]
        engine.eval()
        with torch.no_grad():
            losses = [engine(batch.tokens, batch.targets)[0] for batch in mine]
        engine.train()
        return _mean(torch.stack(losses).mean())

    def _finish(self, engine: Any, loader: Loader, times: list[float], memory: int) -> None:
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        last = self.validate(engine, loader)
        assert self.first_loss is not None
        rate = self.config.tokens_per_step / statistics.mean(times) if times else None
        summary = {
            "experts": self.options.experts,
            "steps": engine.global_steps,
            "validation_loss_before": self.first_loss,
            "validation_loss_after": last,
            "tokens_per_second": rate,
            "peak_memory_bytes": memory,
            "checkpoint_seconds": self.checkpoint_seconds,
        }
        speed = f"{rate:,.0f} tokens/s" if rate else f"no step after the first {WARM} to time"
        self._print(
            f"validation loss after: {last:.4f} nats per byte, before: {self.first_loss:.4f}\n"
            f"{speed}, peak memory {memory / 2**30:.2f} GiB a process"
        )
        if self.checkpoint_seconds:
            self._print(
                f"{len(self.checkpoint_seconds)} checkpoints, "
                f"{statistics.mean(self.checkpoint_seconds):.1f} s each, not in the tokens/s"
            )
        if self.rank == 0:
            self._write("summary.json", summary)

    def _write(self, name: str, content: Any) -> None:
        path = self.request.out / name
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)

    def _record(self, **values: Any) -> None:
        if self.rank == 0:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def _print(self, text: str) -> None:
        if self.rank == 0:
            _print(text)


def _print(text: str) -> None:
    """In one write, so that other processes' lines do not fall between the text and its end."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _mean(value: torch.Tensor) -> float:
    """The mean over all processes."""
    value = value.detach().float().clone()
    torch.distributed.all_reduce(value)
    return value.item() / torch.distributed.get_world_size()
