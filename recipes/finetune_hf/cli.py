"""The command line: what is asked for, checked before anything is written, then done."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fp8moe
from recipes.pretrain.config import UserError

from .output import check_free, new_folder, size_bytes, write_report
from .settings import PRESETS, Settings, choose

NOT_OPTIONS = ("preset", "mode", "export_fp8", "gradient_checkpointing")
HELP = {
    "model": "Hugging Face id or local folder; default: a small Qwen3-MoE with random weights",
    "experts": "fp8, bf16 (transformers' own), or both, one after the other, to compare",
    "data": "file or folder of text; default: the .py files of torch",
    "pattern": "glob that file names of a folder must match",
    "valid_fraction": "share of the text held out, by file",
    "steps": "optimizer steps",
    "seq_len": "tokens in a sequence",
    "batch_size": "sequences in a micro-batch",
    "grad_accumulation": "micro-batches in a step",
    "lr": "peak learning rate",
    "warmup_steps": "steps of linear warm-up before the cosine",
    "eval_sequences": "held-out sequences to evaluate on",
    "log_every": "steps between two lines of progress",
    "lora_rank": "rank of the adapters, a multiple of 8",
    "lora_alpha": "adapters are multiplied by lora_alpha / lora_rank",
    "dtype": "of the weights: float32 or bfloat16",
    "device": "cpu or cuda",
    "seed": "of weights and data order",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m recipes.finetune_hf",
        description=(
            "Fine-tunes a Hugging Face mixture-of-experts model with FP8 experts and the Trainer, "
            "and writes the model and a report to a folder."
        ),
        argument_default=argparse.SUPPRESS,
    )
    top.add_argument("--preset", choices=PRESETS, help="default: h100 on a Hopper GPU, else cpu")
    mode = top.add_mutually_exclusive_group()
    mode.add_argument(
        "--full", dest="mode", action="store_const", const="full",
        help="train all weights (default without --model)",
    )  # fmt: skip
    mode.add_argument(
        "--lora", dest="mode", action="store_const", const="lora",
        help="train adapters of attention and of frozen FP8 experts (default with --model)",
    )  # fmt: skip
    types = {"int": int, "float": float}
    for item in dataclasses.fields(Settings):
        if item.name in NOT_OPTIONS:
            continue
        name = "--" + item.name.replace("_", "-")
        choices = {
            "experts": ("fp8", "bf16", "both"),
            "dtype": ("float32", "bfloat16"),
            "device": ("cpu", "cuda"),
        }.get(item.name)
        top.add_argument(
            name, type=types.get(str(item.type), str), choices=choices, help=HELP[item.name]
        )
    top.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    top.add_argument(
        "--export-fp8", action="store_true", help="also write the model in block FP8 (fp8/)"
    )
    top.add_argument(
        "--output", type=Path, default=Path("runs/finetune_hf"), help="default: runs/finetune_hf"
    )
    top.add_argument(
        "--overwrite", action="store_true", default=False, help="replace the run in --output"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns: 0: done. 2: the request cannot be carried out; nothing was written.
    """
    values = vars(parser().parse_args(argv))
    output, overwrite = values.pop("output"), values.pop("overwrite")
    try:
        settings = choose(values.pop("preset", None), values)
        check_free(output, overwrite)
        _check_packages(settings)
        _run(settings, output, overwrite)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_packages(settings: Settings) -> None:
    needed = ["transformers", "accelerate"] + (["peft"] if settings.lora else [])
    for package in needed:
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"this needs {package}: pip install 'fp8moe[hf,train]'") from error


def _line(name: str, text: str) -> None:
    print(f"{name:<9} {text}", flush=True)


def _run(settings: Settings, output: Path, overwrite: bool) -> None:
    # transformers takes seconds to import: not before the request is known to be possible.
    from transformers.utils import logging

    from . import data, export, models
    from .finetune import finetune

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = models.load_tokenizer(settings)
    text = data.load_text(settings, tokenizer)
    summary = text.summary
    _line("text", f"{summary['source']}: {summary['files']:,} files, {summary['bytes']:,} bytes")
    _line("windows", f"{len(text.train):,} to learn, {len(text.valid):,} held out, of "
          f"{settings.seq_len} tokens ({summary['tokens']})")  # fmt: skip

    report: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "data": summary,
        "device": _device(settings),
        "versions": _versions(),
        "runs": {},
    }
    with new_folder(output, overwrite) as folder:
        for precision in settings.precisions:
            model, run = finetune(precision, text, settings, _line)
            report["runs"][precision] = run
            if precision == settings.precisions[-1]:
                for path in export.export(model, tokenizer, folder, settings):
                    _line("wrote", f"{output / path.name}: {size_bytes(path) / 1e6:,.1f} MB")
            del model
            models.free(settings.device)
        write_report(folder, report)
    _summarize(report)
    _line("report", str(output / "report.json"))


def _device(settings: Settings) -> str:
    if settings.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    import transformers

    return {
        "fp8moe": fp8moe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _summarize(report: dict[str, Any]) -> None:
    print()
    print("experts  loss before  loss after    tokens/s   peak memory")
    for precision, run in report["runs"].items():
        print(
            f"{precision:<7} {run['loss_before']:>12.4f} {run['loss_after']:>11.4f} "
            f"{run['tokens_per_s']:>11,.0f} {run['peak_memory_bytes'] / 1e9:>10.2f} GB"
        )
