"""Whole runs as a user starts them: a process, its output, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
MARK = "VESPO_TEST_RUN"  # in the environment of a run and of everything it starts
START_S = 300.0


class Run:
    """A command in the background, its output in a file; every process it leads to carries the same mark.

    As a context manager it kills, in the end, whatever is left of the run.
    """

    def __init__(self, command: list[str], output: Path):
        self.output_path = output
        self.mark = uuid.uuid4().hex
        # the mark first: setproctitle, which `titled` needs, gives up if the first variable is set anew
        environment = {MARK: self.mark} | os.environ | {"OMP_NUM_THREADS": "1"}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logs = self._logs()
            self.kill()
            raise AssertionError(f"not finished within {timeout_s:g} s:\n{self.output}\n{logs}") from None

    def _logs(self) -> str:
        """The ends of the run's log files, which lie somewhere beside its output."""
        paths = sorted(self.output_path.parent.glob("**/logs/*.log"))
        ends = [(path, path.read_text(errors="replace").splitlines()[-10:]) for path in paths]
        return "\n".join(f"{path.name}: {line[:300]}" for path, lines in ends for line in lines)

    def finish(self, timeout_s: float = START_S, code: int = 0) -> None:
        """It ends by itself, with this exit code, and leaves no process behind."""
        assert self.wait(timeout_s) == code, self.output
        assert nothing_left(self)

    def wait_until(self, condition: Callable[[], object], timeout_s: float = START_S) -> None:
        """While the command runs, which must not end before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"what is waited for has not come:\n{self.output}")
            time.sleep(0.02)

    def wait_for_output(self, text: str, timeout_s: float = START_S) -> None:
        self.wait_until(lambda: text in self.output, timeout_s)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def survivors(self) -> list[psutil.Process]:
        """Processes of this run that still exist."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue  # it ended while we looked
        return found

    def titled(self, words: str) -> list[psutil.Process]:
        """Its processes with these words in their title, such as "sglang::scheduler"."""
        found = []
        for process in self.survivors():
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def schedulers(self, engine: int) -> list[psutil.Process]:
        """The innermost processes of an engine, which is known by the log that their output goes to."""
        log = f"engine-{engine}.log"
        of_engines = self.titled("sglang::scheduler")
        return [p for p in of_engines if Path(f"/proc/{p.pid}/fd/1").resolve().name == log]

    def kill(self) -> None:
        for process in self.survivors():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


def nothing_left(run: Run, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while run.survivors():
        if time.monotonic() > deadline:
            print("left running:", [(p.pid, p.cmdline()) for p in run.survivors()])
            return False
        time.sleep(0.1)
    return True


def finished(command: list[str], log: Path, timeout_s: float = START_S, code: int = 0) -> str:
    """The output of a whole run, which must finish."""
    with Run(command, log) as run:
        run.finish(timeout_s, code)
    return run.output


def write_questions(path: Path, number: int = 16) -> Path:
    """Sums, as a prompt set."""
    rows = [{"question": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_command(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    """A small run: two pipeline stages, four completions of each of four prompts."""
    small = (
        "--trainer-ranks 2 --pipeline-model-parallel-size 2 --lr 1e-4 --train-iters 3 --steps-per-rollout 1 "
        "--rollout-batch-size 4 --group-size 4 --max-prompt-tokens 512 --max-completion-tokens 32 "
        "--max-tokens-per-gpu 2048"
    )
    return [
        *(sys.executable, "-m", "megatron_vespo", "train"),
        *("--hf-checkpoint", str(model), "--prompt-data", str(data), "--output-dir", str(output)),
        *small.split(),
        *flags,
    ]
