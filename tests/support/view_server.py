"""`megatron-vespo view` as a process of its own, as a user starts it."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60.0


@dataclass(frozen=True)
class ViewServer:
    url: str  # with the token
    pid: int

    @property
    def home(self) -> str:
        """The address without the token; a slash at its end."""
        return self.url.split("?")[0]


@contextmanager
def view_server(*runs: Path, cache: Path) -> Iterator[ViewServer]:
    """Serves `runs` on a free port until the block ends; indexes lie below `cache`."""
    command = [sys.executable, "-m", "megatron_vespo", "view", *map(str, runs), "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=START_SECONDS)
            found = re.search(r"http://\S+", line)
            assert found, f"megatron-vespo view printed {line!r}"
            yield ViewServer(found[0], process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            finally:
                process.kill()
