"""``python -m recipes.pretrain.proof``: runs that show what FP8 does to the loss.

Each setting of SETTINGS is trained from several seeds, every run a process of the ordinary recipe
with one model, one process a GPU at a time. What a run measured is kept in ``proof.json``, so that
a second call does what the first one left and a report needs nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from . import checkpoint, metrics, proof_report, report
from . import cli as recipe
from .config import FREE, Config, UserError
from .config import load as load_config
from .presets import PRESETS, choose
from .run import CHECKPOINTS, CONFIG

GEMMS = ("fprop", "dgrad", "wgrad")
# BF16 first: it takes longest, and all others are held against it.
SETTINGS = {
    "bf16": ("--model", "bf16"),
    "fp8": ("--model", "fp8", "--save", "fp8"),
    "fp8-save-bf16": ("--model", "fp8", "--save", "bf16"),
    "fp8-no-pow2": ("--model", "fp8", "--save", "fp8", "--no-pow2-scales"),
    # Only when asked for. The first one shows what chance does on the same batches, the others
    # which GEMM a difference comes from.
    "bf16-nudged": ("--model", "bf16", "--nudge", "1e-3"),
    **{f"fp8-{gemm}": ("--model", "fp8", "--fp8-gemms", gemm) for gemm in GEMMS},
}
DEFAULT = ("bf16", "fp8", "fp8-save-bf16", "fp8-no-pow2")
PROOF = "proof.json"
PICTURE = "proof.png"
# Of the held-out text of the default corpus, 24 micro-batches of the h100 preset are 85 %.
_EVAL_BATCHES = 24
_POLL_S = 0.2
_WIDTH = 130


@dataclass(frozen=True)
class Job:
    """One run: a setting, a seed, and the recipe's command line for them."""

    setting: str
    seed: int
    arguments: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.setting}-s{self.seed}"

    def command(self, runs_dir: Path) -> list[str]:
        words = [sys.executable, "-m", "recipes.pretrain", *self.arguments]
        words += ["--runs-dir", str(runs_dir), "--name", self.name]
        if (runs_dir / self.name / CONFIG).is_file():
            words.append("--resume")  # what a stop left behind
        return words


def jobs(
    settings: Sequence[str], seeds: Sequence[int], preset: str, steps: int, more: Sequence[str]
) -> list[Job]:
    """The runs, the longest first.

    Raises:
        UserError: a config that no run can have, or no GPU for it.
    """
    on_gpu = PRESETS[preset].device == "cuda" if preset in PRESETS else False
    some = str(max(1, steps // 4))
    common = [
        "--preset", preset, "--steps", str(steps), "--eval-every", some, "--observe-every", some,
        "--eval-batches", str(_EVAL_BATCHES), "--log-every", str(max(1, steps // 40)),
        "--checkpoint-every", "0", "--sample-bytes", "0",
    ]  # fmt: skip
    if on_gpu:
        common.append("--compile")
    found = []
    for setting in (name for name in SETTINGS if name in settings):
        for seed in dict.fromkeys(seeds):
            words = [*common, *more, "--seed", str(seed), *SETTINGS[setting]]
            values = vars(recipe.parser().parse_args(words))
            fields = {item.name for item in dataclasses.fields(Config)}
            overrides = {name: value for name, value in values.items() if name in fields}
            _, config = choose(values["preset"], overrides)
            found.append(Job(setting, seed, tuple(words), config))
    return found


def load(path: Path) -> dict[str, Any]:
    """{name: record} of the runs that ``path`` holds."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["runs"]


def is_done(job: Job, runs: Mapping[str, Any]) -> bool:
    """Whether the run's record is there.

    Raises:
        UserError: it is, but of another run than the one asked for now.
    """
    if job.name not in runs:
        return False
    then = dataclasses.asdict(load_config(runs[job.name]["config"]))
    now = dataclasses.asdict(job.config)
    for name, value in now.items():
        if name not in FREE and value != then[name]:
            raise UserError(
                f"{PROOF} holds {job.name} with {name} {then[name]}, asked for now is {value}: "
                "choose another --out"
            )
    return True


def record(job: Job, folder: Path, seconds: float) -> dict[str, Any]:
    """What the proof keeps of a finished run."""
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    records = metrics.read(folder)
    steps, losses = report.series(records, metrics.TRAIN, job.config.model, "loss")
    if steps != list(range(job.config.steps)):
        raise UserError(f"{folder}: expected {job.config.steps} steps, got {len(steps)}")
    valid = report.series(records, metrics.VALID, job.config.model, "loss")
    values = [r["tensors"] for r in metrics.of_kind(records, metrics.VALUES)]
    outcome = report.outcome(records, job.config.model)
    kept = ("tokens_per_s", "step_ms", "memory_bytes", "expert_share", "skipped")
    return {
        "setting": job.setting,
        "seed": job.seed,
        "device": settings["device"],
        "versions": settings["versions"],
        "data": settings["data"],
        "config": settings["config"],
        "seconds": round(seconds, 1),
        **{name: getattr(outcome, name) for name in kept},
        "valid": [[step, round(loss, 6)] for step, loss in zip(*valid, strict=True)],
        "fp8_values": values[-1] if values else None,
        "loss": [round(loss, 6) for loss in losses],
    }


class Queue:
    """Runs the jobs, one process a device at a time, until all ended or a signal came."""

    def __init__(self, out: Path, runs_dir: Path, devices: Sequence[str], console: Console):
        self.out, self.runs_dir, self.console = out, runs_dir, console
        self.devices = list(devices)
        self.runs = load(out / PROOF)
        self.failed: list[str] = []
        self.signal: signal.Signals | None = None
        self._active: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
        self._begin = time.monotonic()

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._begin
        self.console.print(f"[{seconds:6.1f} s] {text}", markup=False, soft_wrap=True)

    def stop(self, number: int, _: Any = None) -> None:
        """Starts no further run and has those under way save and end. A signal handler."""
        if self.signal is None:  # `timeout` signals a process and then its group
            self.signal = signal.Signals(number)
            for _, process, _ in self._active.values():
                process.terminate()

    def run(self, todo: Sequence[Job]) -> None:
        waiting = list(todo)
        while self._active or (waiting and self.signal is None):
            for device in self.devices:
                if waiting and self.signal is None and device not in self._active:
                    self._start(waiting.pop(0), device)
            time.sleep(_POLL_S)
            for device, (job, process, began) in list(self._active.items()):
                code = process.poll()
                if code is not None:
                    del self._active[device]
                    self._end(job, code, time.monotonic() - began)

    def _log(self, job: Job) -> Path:
        return self.runs_dir / f"{job.name}.log"

    def _start(self, job: Job, device: str) -> None:
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        command = job.command(self.runs_dir)
        environment = {**os.environ}
        if job.config.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = device
        with open(self._log(job), "ab") as log:
            # In a group of its own: a signal to this one's group must reach it once, from here.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._active[device] = (job, process, time.monotonic())
        again = "goes on" if command[-1] == "--resume" else "begins"
        self._say(f"{job.name} {again} on device {device}")
        if self.signal is not None:  # it came while the process started
            process.terminate()

    def _end(self, job: Job, code: int, seconds: float) -> None:
        if code == 0:
            try:
                self._keep(job, seconds)
                return
            except (UserError, OSError, ValueError) as error:
                reason = str(error)
        elif self.signal is not None and code in (128 + signal.SIGTERM, -signal.SIGTERM):
            self._say(f"{job.name} stopped after {seconds:.0f} s")
            return
        else:
            reason = f"exit code {code}"
        self.failed.append(job.name)
        lines = self._log(job).read_text(encoding="utf-8", errors="replace").splitlines()
        self._say(f"{job.name} FAILED after {seconds:.0f} s: {reason}; {self._log(job)} ends:")
        for line in lines[-5:]:
            self.console.print(f"    {line}", markup=False, soft_wrap=True)

    def _keep(self, job: Job, seconds: float) -> None:
        folder = self.runs_dir / job.name
        self.runs[job.name] = record(job, folder, seconds)
        write(self.out, self.runs)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # of a stop, gigabytes
        shown = proof_report.result(self.runs[job.name])
        self._say(
            f"{job.name} done in {seconds:.0f} s: loss {shown.train_loss:.4f}, held out "
            f"{shown.valid_loss:.4f}, {shown.tokens_per_s:,.0f} tokens/s"
        )


def write(out: Path, runs: Mapping[str, Any]) -> None:
    """``proof.json``: the summary, and all that it is made of."""
    out.mkdir(parents=True, exist_ok=True)
    value = {"summary": proof_report.summary(runs), "runs": dict(runs)}
    checkpoint.write_json(out / PROOF, value, indent=None)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m recipes.pretrain.proof",
        description=__doc__,
        epilog="What follows -- goes to every run: -- --lr 1e-4 --no-compile",
    )
    top.add_argument("--out", type=Path, required=True, help=f"folder of {PROOF} and {PICTURE}")
    top.add_argument("--runs-dir", type=Path, help="folder of the single runs; default: OUT/runs")
    top.add_argument("--preset", default="h100", help="default: h100")
    top.add_argument("--steps", type=int, default=2000, help="of each run; default: 2000")
    top.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    top.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=list(DEFAULT),
        help=f"default: {' '.join(DEFAULT)}",
    )
    top.add_argument("--gpus", type=int, default=1, help="runs side by side; default: 1")
    top.add_argument("--report-only", action="store_true", help="start no run")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0: all runs asked for are in the report. 1: some failed or are missing. 2: the request
        cannot be carried out. 130 or 143: stopped; the same command goes on.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:at])
    try:
        return _run(options, words[at + 1 :])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _devices(count: int) -> list[str]:
    if count < 1:
        raise UserError(f"--gpus: expected at least 1, got {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    if len(names) < count:
        raise UserError(f"--gpus: CUDA_VISIBLE_DEVICES is {visible}, got {count}")
    return names[:count]


def _run(options: argparse.Namespace, more: Sequence[str]) -> int:
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)  # a log file has none
    out: Path = options.out
    if options.report_only:
        return _report(out, load(out / PROOF), console)
    wanted = jobs(options.settings, options.seeds, options.preset, options.steps, more)
    runs_dir = options.runs_dir or out / "runs"
    queue = Queue(out, runs_dir, _devices(options.gpus), console)
    todo = [job for job in wanted if not is_done(job, queue.runs)]
    console.print(f"{len(todo)} runs to do, {len(wanted) - len(todo)} done before")
    before = {n: signal.signal(n, queue.stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        queue.run(todo)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = _report(out, queue.runs, console)
    missing = [job.name for job in wanted if job.name not in queue.runs]
    if missing:
        console.print(f"missing: {', '.join(missing)}; failed: {', '.join(queue.failed) or '-'}")
    if queue.signal is not None:
        console.print(f"stopped by {queue.signal.name}; the same command goes on")
        return 128 + queue.signal
    return 1 if missing else code


def _report(out: Path, runs: Mapping[str, Any], console: Console) -> int:
    if not runs:
        console.print(f"{out / PROOF}: no finished run")
        return 1
    write(out, runs)
    proof_report.print_tables(runs, console)
    proof_report.draw(runs, out / PICTURE)
    console.print(f"picture: {out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
