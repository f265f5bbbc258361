"""Starts a program as the ranks of one torch.distributed job and collects what each rank hands back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PROGRAMS = Path(__file__).parent / "programs"
REPOSITORY = Path(__file__).parents[2]
SHOWN_OUTPUT = 4000  # characters of a failing rank
TIMEOUT_S = 120  # for one program, imports included

Result = dict[str, np.ndarray]


def launch(
    program: Path, num_ranks: int, arguments: Sequence[str], timeout_s: float, folder: Path
) -> list[Result]:
    """Run `python program *arguments` as `num_ranks` processes; returns what each wrote to $RESULT_FILE.

    Logs and results are left in `folder`. RuntimeError names the first rank that failed, or those that still
    ran after `timeout_s`, with the end of their output; the other ranks are killed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"result-{rank}.npz" for rank in range(num_ranks)]
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    port = _free_port()
    processes = []
    try:
        for rank in range(num_ranks):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(REPOSITORY),
                "RESULT_FILE": str(results[rank]),
            }
            with logs[rank].open("w") as log:
                command = [sys.executable, "-W", "ignore", str(program), *arguments]
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        _wait(processes, logs, time.monotonic() + timeout_s, f"{program.name} on {num_ranks} ranks")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [dict(np.load(result)) for result in results]


def _wait(processes: list[subprocess.Popen], logs: list[Path], deadline: float, what: str) -> None:
    running = set(range(len(processes)))
    while running:
        for rank in sorted(running):
            code = processes[rank].poll()
            if code:
                raise RuntimeError(f"{what}: rank {rank} ended with code {code}:\n{_end(logs[rank])}")
            if code == 0:
                running.remove(rank)
        if time.monotonic() > deadline:
            ends = "".join(f"\nrank {rank}:\n{_end(logs[rank])}" for rank in sorted(running))
            raise RuntimeError(f"{what}: ranks {sorted(running)} still ran at the deadline{ends}")
        time.sleep(0.05)


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-SHOWN_OUTPUT:]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
