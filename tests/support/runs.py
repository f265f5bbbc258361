"""Whole runs as a user starts them: a process, its output, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
MARK = "VESPO_TEST_RUN"  # in the environment of a run and of everything it starts


class Run:
    """A command in the background, its output in a file; every process it leads to carries the same mark."""

    def __init__(self, command: list[str], output: Path):
        self.output_path = output
        self.mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not finished within {timeout_s:g} s:\n{self.output}") from None

    def wait_for_output(self, text: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{text!r} did not appear:\n{self.output}")
            time.sleep(0.2)

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


def train_command(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    """A small run: two pipeline stages, four completions of each of four prompts."""
    return [
        *(sys.executable, "-m", "megatron_vespo", "train"),
        *("--hf-checkpoint", str(model), "--prompt-data", str(data), "--output-dir", str(output)),
        *(
            "--trainer-ranks",
            "2",
            "--pipeline-model-parallel-size",
            "2",
            "--lr",
            "1e-4",
            "--train-iters",
            "3",
        ),
        *("--steps-per-rollout", "1", "--rollout-batch-size", "4", "--group-size", "4"),
        *("--max-prompt-tokens", "512", "--max-completion-tokens", "32", "--max-tokens-per-gpu", "2048"),
        *flags,
    ]
