"""The processes that the checks of expert parallelism run in.

python tests/modules/dispatch_ranks.py SIZE FOLDER DEVICE     # starts all of them
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

E, K, H, I = 8, 3, 128, 128  # noqa: E741
TIMEOUT_S = {"cpu": 100, "cuda": 60}  # of one collective
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


def run_checks(rank: int, size: int, folder: Path, device: str) -> None:
    """All checks in order; their outcomes go to FOLDER/SIZE-RANK.json.

    The first failure ends the process, and through the broken connections the others: after it the
    ranks would no longer be at the same place.
    """
    import_checks()
    torch.set_num_threads(1)
    ranks = Ranks(rank, size, device, folder)
    where = {}
    if device == "cuda":
        torch.cuda.set_device(rank)
        where["device_id"] = ranks.device
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(str(folder / f"store-{size}"), size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S[device]),
        **where,
    )
    outcome: dict[str, str] = {}
    path = folder / f"outcome-{size}-{rank}.json"
    for name, fn in CHECKS.items():
        try:
            fn(ranks)
            dist.barrier()
            outcome[name] = "passed"
        except BaseException:
            outcome[name] = traceback.format_exc()
        path.write_text(json.dumps(outcome))
        if outcome[name] != "passed":
            os._exit(1)
    dist.destroy_process_group()


def import_checks() -> None:
    import dispatch_layer_checks  # noqa: F401  (they enter themselves into CHECKS)
    import dispatch_model_checks  # noqa: F401
    import torch._dynamo  # noqa: F401  (an optimizer's first step would import it in every rank)


def start_ranks(size: int, folder: Path, device: str) -> int:
    """Fork the ranks after importing what the checks need once. CUDA allows no fork after anything
    asked it for a GPU, so there every rank is a process of its own.

    Returns: 1 if one of them did not come to the end, else 0.
    """
    if device == "cpu":
        import_checks()
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    arguments = [(rank, size, folder, device) for rank in range(size)]
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
    limit_s = 2 * TIMEOUT_S[device]
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
        text = f"no end after {limit_s} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    paths = [folder / f"outcome-{size}-{rank}.json" for rank in range(size)]
    outcomes = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    failed = any(outcome != "passed" for found in outcomes for outcome in found.values())
    if process.returncode and not failed:  # killed, by the watchdog of NCCL for one
        done = [list(found)[-1:] for found in outcomes]
        raise RuntimeError(f"ended without a result after the checks {done}:\n{text[-4000:]}")
    return outcomes


if __name__ == "__main__":
    # Under its own name, which the checks import, and not as __main__.
    import dispatch_ranks

    sys.exit(dispatch_ranks.start_ranks(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
