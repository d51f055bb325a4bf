"""The command line: what is asked for, checked before anything is written, then done."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import fp8moe

from . import checkpoint, metrics, parallel, report
from .config import Config, UserError, option
from .data import Corpus, load_corpus
from .expert_time import expert_share
from .presets import PRESETS, choose
from .run import RunFolder, check_same_data, next_name, resumed_config
from .sample import write_texts
from .stop import StopRequest
from .trainer import Trainer
from .twin import Diverged


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m recipes.pretrain",
        description=(
            "Trains a small mixture-of-experts language model on bytes of text: in BF16, and from "
            "the same seed on the same batches with FP8 experts. Writes runs/<name>/."
        ),
    )
    top.add_argument(
        "--preset", help=f"{' or '.join(PRESETS)}; default: h100 on a Hopper GPU, else cpu"
    )
    top.add_argument("--name", help="name of the run; default: <preset>-<n>")
    top.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: runs")
    top.add_argument("--resume", action="store_true", help="continue the run called --name")
    top.add_argument("--overwrite", action="store_true", help="replace the run called --name")
    group = top.add_argument_group("hyperparameters", "defaults come from the preset")
    types = {"int": int, "float": float, "bool": bool}
    for item in dataclasses.fields(Config):
        kwargs: dict[str, Any] = {
            "dest": item.name, "default": argparse.SUPPRESS, "help": item.metadata["help"]
        }  # fmt: skip
        if item.type == "bool":
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs["type"] = types.get(str(item.type), str)
            kwargs["choices"] = item.metadata["choices"]
        group.add_argument(f"--{option(item.name)}", **kwargs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0: done. 2: the request cannot be carried out, nothing was written. 3: training diverged.
        130 or 143: stopped by Ctrl-C or SIGTERM, with a checkpoint.
    """
    values = vars(parser().parse_args(argv))
    names = {item.name for item in dataclasses.fields(Config)}
    overrides = {name: value for name, value in values.items() if name in names}
    try:
        code = _run(values, overrides)
        parallel.end()
        return code
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint, if any, is whole", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, Diverged) else 2


def _run(values: dict[str, Any], overrides: dict[str, Any]) -> int:
    runs_dir, resume = values["runs_dir"], values["resume"]
    if resume and values["overwrite"]:
        raise UserError("--resume and --overwrite exclude each other")
    settings: dict[str, Any] = {}
    if resume:
        if values["name"] is None:
            raise UserError("--resume: expected --name of the run to continue")
        folder = RunFolder(runs_dir, values["name"])
        settings = folder.settings()
        preset, config = resumed_config(settings, values["preset"], overrides)
        ranks = parallel.start(config)
    else:
        preset, config = choose(values["preset"], overrides)
        ranks = parallel.start(config)
        folder = RunFolder(runs_dir, values["name"] or next_name(runs_dir, preset))
        if ranks.first:
            folder.check_new(values["overwrite"])
    console = Console(highlight=False, quiet=not ranks.first)
    corpus = load_corpus(config)
    if resume:
        check_same_data(settings, corpus)
    make_deterministic()
    _check_fp8(config)
    trainer = Trainer(config, corpus, ranks)
    saved = None
    if ranks.first:
        if resume:
            folder.reopen(preset, config, corpus)
        else:
            folder.create(preset, config, corpus, values["overwrite"])
    try:
        if resume:
            saved = _latest(folder, ranks)
            if settings["threads"] != torch.get_num_threads() and config.device == "cpu":
                console.print(
                    f"note: the run began with {settings['threads']} threads, now "
                    f"{torch.get_num_threads()}: the last bits of its numbers may differ"
                )
        _print_start(console, folder, preset, config, corpus)
        if saved is not None:
            trainer.restore(saved)
            console.print(f"resumed at step {trainer.step} from {saved.path}")
        return _train(trainer, folder, corpus, saved, console)
    finally:
        folder.release()


def _latest(folder: RunFolder, ranks: parallel.Ranks) -> checkpoint.Checkpoint | None:
    """The newest checkpoint. The first process looks first: it deletes what is half written."""
    saved = checkpoint.latest(folder.checkpoints) if ranks.first else None
    ranks.wait()
    return saved if ranks.first else checkpoint.latest(folder.checkpoints)


def make_deterministic() -> None:
    """Same input, same bits: resuming relies on it. What has no such kernel only warns."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling every fresh tensor, which the line above turns on too, would cost a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _check_fp8(config: Config) -> None:
    """Runs a first FP8 layer: a machine that lacks something says so before the run's folder
    exists."""
    if "fp8" not in config.twins:
        return
    device = torch.device(config.device)
    x = torch.zeros(1, 128, device=device, dtype=torch.bfloat16)
    ids = torch.zeros(1, 1, device=device, dtype=torch.int32)
    weights = torch.ones(1, 1, device=device)
    w13 = torch.zeros(1, 256, 128, device=device)
    w2 = torch.zeros(1, 128, 128, device=device)
    try:
        fp8moe.swiglu_experts(x, ids, weights, w13, w2, config=fp8moe.FP8Config())
    except RuntimeError as error:
        raise UserError(f"--device {config.device}: no FP8 here: {error}") from error


def _print_start(
    console: Console, folder: RunFolder, preset: str, config: Config, corpus: Corpus
) -> None:
    device = "CPU"
    if config.device == "cuda":
        device = torch.cuda.get_device_name()
    bits = corpus.entropy
    if config.ep > 1:
        device = f"{config.ep} x {device}"
    console.print(
        f"run       {folder.path} (preset {preset}, {device}, twins: {', '.join(config.twins)})\n"
        f"text      {escape(corpus.source)}: {corpus.num_files:,} files, "
        f"{corpus.num_bytes:,} bytes, sha256 {corpus.sha256[:16]}\n"
        f"          {corpus.train.numel():,} bytes to learn, {corpus.valid.numel():,} held out; "
        f"entropy of single bytes {bits:.4f} nats\n"
        f"model     {config.parameters / 1e6:.1f} M parameters, "
        f"{config.active_parameters / 1e6:.1f} M per token; {config.layers} layers, "
        f"{config.experts} experts, top {config.top_k}\n"
        f"step      {config.tokens_per_step:,} tokens, {config.flops_per_step / 1e9:,.1f} GFLOP, "
        f"of which experts {config.expert_flops_per_step / 1e9:,.1f}; {config.steps:,} steps",
        soft_wrap=True,
    )


def _train(
    trainer: Trainer,
    folder: RunFolder,
    corpus: Corpus,
    saved: checkpoint.Checkpoint | None,
    console: Console,
) -> int:
    offset = 0 if saved is None else saved.state["metrics_bytes"]
    first = trainer.ranks.first
    log = metrics.Metrics(folder.path, offset, trainer.step) if first else metrics.NoMetrics()
    try:
        with StopRequest() as stop:
            finished = trainer.train(folder.checkpoints, log, stop)
        if not finished:
            # Where the signal came to another process alone, this one reports it as SIGTERM.
            number = stop.signal or signal.SIGTERM
            console.print(
                f"stopped by {number.name} at step {trainer.step}; continue with "
                f"--resume --name {folder.name}"
            )
            return 128 + number
        _close(trainer, log, console)
    finally:
        log.close()
    if not first:
        return 0
    records = metrics.read(folder.path)
    picture = folder.path / report.PICTURE
    title = f"{folder.name}: {trainer.config.parameters / 1e6:.1f} M parameters on {corpus.source}"
    report.draw(records, trainer.config, corpus.entropy, title, picture)
    report.print_table(records, trainer.config, corpus.entropy, console)
    console.print(f"picture: {picture}")
    return 0


def _close(trainer: Trainer, log: metrics.Metrics, console: Console) -> None:
    """What is measured and shown once, after the last step."""
    config = trainer.config
    for twin in trainer.twins:
        share = expert_share(twin, trainer.loader.step(config.steps - 1))
        log.write(metrics.PROFILE, model=twin.name, expert_share=share)
    if config.sample_bytes:
        for twin in trainer.twins:
            for prompt, text in write_texts(twin, config):
                log.write(metrics.SAMPLE, model=twin.name, prompt=prompt, text=text)
                console.rule(f"{report.NAMES[twin.name]} writes", align="left")
                console.print(escape(prompt + text), soft_wrap=True)
    console.rule()
