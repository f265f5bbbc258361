"""Starts a program as the ranks of one torch.distributed job and collects what each rank hands back.

Ranks are forked from one server that has imported torch and Megatron, which takes seconds, before.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import numpy as np

PROGRAMS = Path(__file__).parents[1] / "distributed" / "programs"
REPOSITORY = Path(__file__).parents[2]
SHOWN_OUTPUT = 4000  # characters of a failing rank
TIMEOUT_S = 120  # for one program, imports included
KILL_TIMEOUT_S = 10

# no thread pool may exist where processes are forked, and ranks share few cores
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
PRELOADED = ["tests.support.preload"]

Result = dict[str, np.ndarray]


def configure(preloaded: Sequence[str], environment: dict[str, str]) -> None:
    """What this process's server imports first, and more variables; to be called before `launch`."""
    PRELOADED[:0] = preloaded
    ENVIRONMENT.update(environment)


def launch(
    program: Path,
    num_ranks: int,
    arguments: Sequence[str],
    timeout_s: float,
    folder: Path,
    preloaded: bool = True,
) -> list[Result]:
    """Run `python program *arguments` as `num_ranks` processes; returns what each wrote to $RESULT_FILE.

    `preloaded`: the program finds torch, Megatron and the machine's runtime plugins imported; without it the
    interpreter is a fresh one. Logs and results are left in `folder`. RuntimeError names the first rank that
    failed, or those that still ran after `timeout_s`, with the end of their output; the other ranks are
    killed then, and all of them when this process dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"result-{rank}.npz" for rank in range(num_ranks)]
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    port = _free_port()
    if preloaded:
        _ensure_server()
    context = multiprocessing.get_context("forkserver" if preloaded else "spawn")
    processes: list[BaseProcess] = []
    try:
        for rank in range(num_ranks):
            environment = ENVIRONMENT | {
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_PORT": str(port),
                "RESULT_FILE": str(results[rank]),
            }
            process = context.Process(target=_run, args=(program, arguments, environment, logs[rank]))
            process.start()
            processes.append(process)
        _wait(processes, logs, time.monotonic() + timeout_s, f"{program.name} on {num_ranks} ranks")
    finally:
        for process in processes:
            process.kill()
            process.join(KILL_TIMEOUT_S)
    return [dict(np.load(result)) for result in results]


def _ensure_server() -> None:
    """Starts the server unless it runs; it ends with the last process that holds its pipe, killed or not."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()


def _run(program: Path, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """What a rank does, in a process of its own."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _wait(processes: list[BaseProcess], logs: list[Path], deadline: float, what: str) -> None:
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        ended = connection.wait(running, max(0.0, deadline - time.monotonic()))
        if not ended:
            ends = "".join(f"\nrank {rank}:\n{_end(logs[rank])}" for rank in sorted(running.values()))
            raise RuntimeError(f"{what}: ranks {sorted(running.values())} still ran at the deadline{ends}")
        for rank in sorted(running.pop(sentinel) for sentinel in ended):
            processes[rank].join(KILL_TIMEOUT_S)
            code = processes[rank].exitcode
            if code:
                raise RuntimeError(f"{what}: rank {rank} ended with code {code}:\n{_end(logs[rank])}")


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-SHOWN_OUTPUT:]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
