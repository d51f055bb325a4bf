"""The processes that the checks of expert parallelism run in.

python tests/modules/dispatch_ranks.py SIZE FOLDER DEVICE [CHECK ...]     # starts all of them

Each rank says on its standard output, and in FOLDER/progress-SIZE-RANK.txt, which check it begins
and how long it took. A check that takes longer than its limit is ended with the stack of every
thread in that file.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

E, K, H, I = 8, 3, 128, 128  # noqa: E741
CHECK_S = {"cpu": 60, "cuda": 20}  # of one check
START_S = {"cpu": 60, "cuda": 45}  # before the first: kernels are compiled, connections made
TOTAL_S = {"cpu": 200, "cuda": 150}
COLLECTIVE_S = 90  # longer than a check: its limit says more than that of a collective
PEERS_S = 5  # in which the others may still say what went wrong with them


class Ranks:
    """This process and the others."""

    def __init__(self, rank: int, size: int, device: str, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.device = torch.device(device, rank) if device == "cuda" else torch.device(device)

    @property
    def group(self) -> Any:
        return dist.group.WORLD

    def experts_of(self, experts: int) -> slice:
        """Those of this rank."""
        return slice(self.rank * experts // self.size, (self.rank + 1) * experts // self.size)

    def tokens(self, total: int) -> slice:
        """This rank's part of a batch: uneven, and none on rank 1."""
        shares = torch.tensor([3, 0, 5, 1, 2, 2, 7, 1][: self.size])
        ends = (shares.cumsum(0) * total // shares.sum()).tolist()
        return slice(([0, *ends])[self.rank], ends[self.rank])

    def even(self, total: int) -> slice:
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)


CHECKS: dict[str, Callable[[Ranks], None]] = {}


def check(fn: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
    CHECKS[fn.__name__] = fn
    return fn


def any_rank(ranks: Ranks, value: bool) -> bool:
    flag = torch.tensor(float(value), device=ranks.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class Progress:
    """Says where a rank is, as it goes, and ends it where it stays too long."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self._rank = rank
        self._file = (folder / f"progress-{size}-{rank}.txt").open("w", buffering=1)

    def _say(self, text: str) -> None:
        self._file.write(f"{text}\n")
        os.write(1, f"[{self._rank}] {text}\n".encode())  # whole, whatever the other ranks write

    @contextlib.contextmanager
    def of(self, name: str, limit_s: float) -> Iterator[None]:
        self._say(f"{name}: begins, limit {limit_s} s")
        start = time.perf_counter()
        # A thread of its own, which needs no GIL: it also ends a rank that hangs inside NCCL.
        faulthandler.dump_traceback_later(limit_s, exit=True, file=self._file)
        try:
            yield
        except BaseException:
            self._say(f"{name}: failed after {time.perf_counter() - start:.2f} s")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._say(f"{name}: {time.perf_counter() - start:.2f} s")


def start(ranks: Ranks) -> None:
    """Kernels compiled once for all ranks, a checkpoint of one process, the connections."""
    device, where = ranks.device, {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        where["device_id"] = device
    store = dist.FileStore(str(ranks.folder / f"store-{ranks.size}"), ranks.size)
    if ranks.rank == 0:
        import dispatch_model_checks

        saved = ranks.folder / "saved-1"
        if not saved.exists():
            dispatch_model_checks.save(saved, device, None, no_dist=True)
        store.set("saved", "yes")
    store.wait(["saved"], datetime.timedelta(seconds=START_S[device.type]))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_S),
        **where,
    )
    dist.barrier()


def run_checks(rank: int, size: int, folder: Path, device: str, names: list[str]) -> None:
    """The checks of these names in order; their outcomes go to FOLDER/outcome-SIZE-RANK.json.

    The first failure ends the process, and through the broken connections the others: after it the
    ranks would no longer be at the same place.
    """
    progress = Progress(rank, size, folder)
    ranks = Ranks(rank, size, device, folder)
    with progress.of("start", START_S[device]):
        import_checks()
        torch.set_num_threads(1)
        start(ranks)
    outcome: dict[str, str] = {}
    path = folder / f"outcome-{size}-{rank}.json"
    for name in names or CHECKS:
        try:
            with progress.of(name, CHECK_S[device]):
                CHECKS[name](ranks)
                dist.barrier()
            outcome[name] = "passed"
        except BaseException:
            outcome[name] = traceback.format_exc()
        path.write_text(json.dumps(outcome))
        if outcome[name] != "passed":
            print(outcome[name], flush=True)
            os._exit(1)
    with progress.of("end", CHECK_S[device]):
        dist.destroy_process_group()


def import_checks() -> None:
    import dispatch_layer_checks  # noqa: F401  (they enter themselves into CHECKS)
    import dispatch_model_checks  # noqa: F401
    import torch._dynamo  # noqa: F401  (an optimizer's first step would import it in every rank)


def start_ranks(size: int, folder: Path, device: str, names: list[str]) -> int:
    """Fork the ranks after importing what the checks need once. CUDA allows no fork after anything
    asked it for a GPU, so there every rank is a process of its own.

    Returns: 1 if one of them did not come to the end, else 0.
    """
    for old in ("store", "outcome", "progress"):
        for path in folder.glob(f"{old}-{size}*"):
            path.unlink()
    if device == "cpu":
        import_checks()
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    arguments = [(rank, size, folder, device, names) for rank in range(size)]
    processes = [context.Process(target=run_checks, args=args) for args in arguments]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:  # over NCCL the others would wait for it until the time is over
                for other in running.values():
                    other.join(PEERS_S)
                    other.kill()
                return 1
    return 0


def launch(size: int, folder: Path, device: str) -> list[dict[str, str]]:
    """The outcomes of all checks, {check: "passed" or a traceback}, on each of `size` ranks."""
    root = Path(__file__).resolve().parents[2]
    # NVLink multicast is of no use here, and not every host offers it.
    settings = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    settings["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"  # writing a trace would take another minute
    limit_s = TOTAL_S[device]
    process = subprocess.Popen(
        [sys.executable, __file__, str(size), str(folder), device],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text = process.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end after {limit_s} s\n{where(size, folder)}") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    paths = [folder / f"outcome-{size}-{rank}.json" for rank in range(size)]
    outcomes = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    failed = any(outcome != "passed" for found in outcomes for outcome in found.values())
    if process.returncode and not failed:  # killed, at a check's limit for one
        raise RuntimeError(f"ended without a result:\n{text[-2000:]}\n{where(size, folder)}")
    return outcomes


def where(size: int, folder: Path) -> str:
    """The check that each rank began last, and its stacks if it was ended there."""
    said = []
    for rank in range(size):
        path = folder / f"progress-{size}-{rank}.txt"
        text = path.read_text() if path.exists() else ""
        begun = text.rfind("\n", 0, text.rfind(": begins")) + 1
        said.append(f"rank {rank} of {size}: {text[begun:][:3000] or 'did not begin'}")
    return "\n".join(said)


if __name__ == "__main__":
    # Under its own name, which the checks import, and not as __main__.
    import dispatch_ranks

    size, folder, device, *names = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    sys.exit(dispatch_ranks.start_ranks(int(size), Path(folder), device, names))
