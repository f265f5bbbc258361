"""Runs the study: every run of `design.trials` that `results/runs.jsonl` lacks, then the table and pictures.

    python study.py [--work DIR] [--results DIR] [--workers 2] [--only WORD]

It can be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import base_model
import design
from pictures import plot_curves, plot_window
from table import tables
from trial import Trial, run

HERE = Path(__file__).parent
TRIAL_TIMEOUT_S = 1800.0
PRELOADED = [
    "trial",
    "megatron_vespo.arguments.parse",
    "megatron_vespo.trainer.policy",
    "megatron.training.arguments",
]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Finished runs, in the order they finished."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(work: Path, results: Path, num_workers: int, only: str | None) -> None:
    """Runs until the design names nothing new."""
    base = work / "base"
    print(f"base model: sampled accuracy {base_model.make(base):.3f}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    path, started, num_done = results / "runs.jsonl", time.monotonic(), 0
    with path.open("a") as file:
        for record in _finished(path, base, work, num_workers, only):
            file.write(json.dumps(record) + "\n")
            file.flush()
            num_done += 1
            minutes = (time.monotonic() - started) / 60
            print(
                f"{minutes:6.1f} min  run {num_done}: {record['key']}  accuracy {record['accuracy'][0]:.2f}"
                f" -> {record['accuracy'][-1]:.2f}  {record['seconds']:.0f} s  {record['error'] or ''}",
                flush=True,
            )


def _finished(path: Path, base: Path, work: Path, num_workers: int, only: str | None) -> Iterator[dict]:
    """Records as runs finish; a new run starts as soon as a worker is free."""
    _start_server()
    running: dict[str, _Running] = {}
    failed: set[str] = set()
    try:
        while True:
            records = read_records(path)
            known = {record["key"] for record in records} | running.keys() | failed
            wanted = [t for t in design.trials(records) if t.key not in known and (not only or only in t.key)]
            wanted = list(dict.fromkeys(wanted))
            for trial in wanted[: num_workers - len(running)]:
                running[trial.key] = _Running(trial, base, work / "logs")
            if not running:
                break
            for key in _wait(running):
                record = running.pop(key).result()
                if record is None:
                    failed.add(key)
                else:
                    yield record
    finally:
        for one in running.values():
            one.kill()
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, see {work / 'logs'}: {', '.join(sorted(failed))}")


def _wait(running: dict[str, _Running]) -> list[str]:
    """Keys of the runs that have ended, or are over their deadline."""
    by_pipe = {one.pipe: key for key, one in running.items()}
    left = min(one.deadline for one in running.values()) - time.monotonic()
    ended = [by_pipe[pipe] for pipe in connection.wait(by_pipe, max(0.0, left))]
    return ended or [key for key, one in running.items() if one.deadline <= time.monotonic()]


class _Running:
    """One run in a process of its own: Megatron keeps global state."""

    def __init__(self, trial: Trial, base: Path, logs: Path):
        self._trial, self.deadline = trial, time.monotonic() + TRIAL_TIMEOUT_S
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / (trial.key.replace("|", "_").replace("/", "_").replace(" ", "") + ".log")
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_work, args=(trial, base, log, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def result(self) -> dict[str, Any] | None:
        """The record, or None if there is none."""
        try:
            if not self.pipe.poll():
                return None
            record = self.pipe.recv()
        except EOFError:
            return None
        finally:
            self.kill()
        return record

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _work(trial: Trial, base: Path, log: Path, pipe: connection.Connection) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            pipe.send({"key": trial.key, **run(trial, base)})
        except BaseException:
            traceback.print_exc()
            raise


def _start_server() -> None:
    """The process that all runs are forked from: it has imported what takes seconds to import."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    search_path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=search_path, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def report(results: Path) -> None:
    """Tables and pictures of the runs that are there."""
    runs, real_stack = (
        {record["key"]: record for record in read_records(results / name)}
        for name in ("runs.jsonl", "real_stack.jsonl")
    )
    (results / "tables.md").write_text(tables(runs, real_stack))
    plot_curves(runs, results / "curves_tuned.png", None, "At each cell's best learning rate")
    shared = design.on_policy_learning_rate(runs)
    if shared is not None:
        plot_curves(runs, results / "curves_shared.png", shared, f"At the learning rate {shared:g}")
    plot_window(runs, results / "window.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="base model and logs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--only", help="runs whose key contains this")
    parser.add_argument("--report-only", action="store_true", help="tables and pictures of what there is")
    options = parser.parse_args()
    if not options.report_only:
        run_all(options.work, options.results, options.workers, options.only)
    report(options.results)


if __name__ == "__main__":
    sys.exit(main())
