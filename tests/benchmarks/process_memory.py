"""Runs a command and watches its memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_S = 0.02
_SHOWN = 4000  # characters of a command that failed


@dataclass(frozen=True)
class Run:
    """Memory in bytes, of the process itself; what it forks is not counted."""

    output: str
    seconds: float
    peak: int  # resident: its own pages and those of files that it has mapped
    peak_anonymous: int  # without the files' pages, which the system may drop at any time


def run(command: Sequence[str], environment: Mapping[str, str], timeout_s: float, log: Path) -> Run:
    """RuntimeError with the end of what it printed if it fails, or runs for too long."""
    started, peak, anonymous = time.monotonic(), 0, 0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None and time.monotonic() - started < timeout_s:
                status = _status(process.pid)
                # kept by the system; unlike getrusage's it starts anew with the program
                peak = max(peak, status.get("VmHWM", 0))
                anonymous = max(anonymous, status.get("RssAnon", 0) + status.get("RssShmem", 0))
                time.sleep(_INTERVAL_S)
        finally:
            process.kill()
            process.wait()
    seconds = time.monotonic() - started
    output = log.read_text(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-_SHOWN:]}")
    return Run(output, seconds, peak, anonymous)


def _status(pid: int) -> dict[str, int]:
    """The fields of /proc/PID/status that are in kB, as bytes; none of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in fields}
