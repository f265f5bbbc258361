"""Starts, checks and stops one SGLang server as a child process group, and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_vespo.rollout.api_key import hand_over
from megatron_vespo.rollout.server_arguments import MEMORY_SAVER, has_pausable_graphs, has_symmetric_memory
from megatron_vespo.system.http import EngineRequestError, get_json
from megatron_vespo.system.ports import RENDEZVOUS_PORT_OFFSET, PortError, require_free_ports
from megatron_vespo.system.process_environment import (
    LIBRARIES,
    apply,
    engine_environment,
    exported_values,
    reached_directly,
)

LOG_TAIL_LINES = 15
HEALTH_TIMEOUT_S = 30.0  # /health generates a token: it takes at least a second
VISIBLE = "CUDA_VISIBLE_DEVICES"
FAILED_PLUGIN = re.compile(r"Failed to (?:load plugin|execute general plugin:?) (\S+)")


class EngineError(RuntimeError):
    """An engine could not start, died, or did not stop; the message has the end of its log."""

    def __init__(self, what: str, log: str = ""):
        super().__init__(what, log)
        self.what, self.log = what, log

    def __str__(self) -> str:
        return f"{self.what}; {self.log}" if self.log else self.what


class EnginePortError(EngineError):
    """The port that the user chose is not free; another attempt would not help."""


class SGLangServer:
    """An SGLang server on this machine, in its own process group; it dies with its starting process.

    Args:
        server_args: SGLang's own flags (see `server_arguments`), without model path, host and ports.
        log_path: the server's output is appended to it.
        devices: the visible GPUs, as in CUDA_VISIBLE_DEVICES; None: those of this process.
        exported: the variables of `process_environment.TABLE` that the user set; None: those of this process.
    """

    def __init__(
        self,
        model_path: str,
        host: str,
        port: int,
        server_args: list[str],
        log_path: Path,
        start_timeout_s: float,
        api_key: str | None = None,
        devices: str | None = None,
        exported: Mapping[str, str] | None = None,
    ):
        self.model_path = model_path
        self.host = host
        self.port = port
        self.server_args = server_args
        self.log_path = Path(log_path)
        self.start_timeout_s = start_timeout_s
        self._api_key, self._devices, self._exported = api_key, devices, exported
        self._process: subprocess.Popen | None = None
        self._log_start = 0  # bytes of earlier starts in the same file

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Leader of the server's process group."""
        assert self._process is not None, "engine not started"
        return self._process.pid

    def start(self) -> None:
        """Starts the server and waits until it is healthy. After an EngineError no process is left."""
        assert self._process is None, "engine already started"
        try:
            require_free_ports(self.host, self.port)
        except PortError as error:  # it was free a moment ago; the next attempt uses another port
            raise EngineError(str(error)) from error
        rendezvous_port = self.port + RENDEZVOUS_PORT_OFFSET
        command = [sys.executable, "-m", "megatron_vespo.rollout.server_process", str(os.getpid())]
        command += ["--model-path", self.model_path, "--host", self.host, "--port", str(self.port)]
        command += ["--nccl-port", str(rendezvous_port), *self.server_args]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        try:
            assert self._process.stdin is not None
            hand_over(self._api_key, self._process.stdin)
            self._wait_until_healthy()
        except BaseException:
            self.stop(timeout_s=0)
            raise

    def _environment(self) -> dict[str, str]:
        user = exported_values(os.environ) if self._exported is None else self._exported
        values = engine_environment(
            user,
            memory_saver=MEMORY_SAVER in self.server_args,
            pausable_graphs=has_pausable_graphs(self.server_args),
            symmetric_memory=has_symmetric_memory(self.server_args),
            library_path=os.environ.get(LIBRARIES, ""),
        )
        if self._devices is not None:
            values[VISIBLE] = self._devices
        return apply(values | reached_directly(self.host, os.environ), os.environ)

    def check(self) -> None:
        """Raises EngineError, with the end of the log, if the server is not running."""
        if self._process is None:
            raise EngineError(f"engine {self.url} is not running")
        status = self._process.poll()
        if status is not None:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise EngineError(f"engine {self.url} died ({how})", self._log_tail())

    def stop(self, timeout_s: float) -> None:
        """Ends the whole process group: SIGTERM, up to `timeout_s` seconds of grace, then SIGKILL."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if timeout_s > 0 and process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass  # SGLang drains running requests first; SIGKILL below does not wait for them
        deadline = time.monotonic() + 30
        while members := group_members(process.pid):
            if time.monotonic() > deadline:
                raise EngineError(f"engine {self.url}: processes {members} survive SIGKILL")
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            process.poll()
            time.sleep(0.05)
        process.wait(30)

    def __enter__(self) -> SGLangServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(timeout_s=0)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        last = "it was not asked"
        while True:
            self._check_plugins()
            self.check()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise EngineError(
                    f"engine {self.url} is not healthy {self.start_timeout_s:g} s after its start",
                    f"{last}; {self._log_tail()}",
                )
            try:
                get_json(self.url, "/health", min(HEALTH_TIMEOUT_S, remaining), self._api_key)
                break
            except EngineRequestError as error:
                last = error.reason
                time.sleep(0.25)  # still starting
        self._check_plugins()

    def _check_plugins(self) -> None:
        """Raises EngineError for a failed plugin: SGLang only logs the failure and runs without it."""
        failed = sorted({match.group(1) for match in FAILED_PLUGIN.finditer(self._log())})
        if failed:
            raise EngineError(
                f"engine {self.url}: SGLang plugin {', '.join(failed)} failed; see {self.log_path}"
            )

    def _log(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _log_tail(self) -> str:
        lines = [line for line in self._log().splitlines() if line.strip()]
        return "\n".join([f"the end of {self.log_path}:", *lines[-LOG_TAIL_LINES:]])


def group_members(process_group: int) -> list[int]:
    """Ids of the group's processes that still run; zombies do not count.

    While other threads of a process end, it looks like a zombie, but still holds its ports.
    """
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            state, group, num_threads = fields[0], int(fields[2]), int(fields[17])
        except (OSError, ValueError, IndexError):
            continue  # it has just ended
        if group == process_group and (state != "Z" or num_threads > 1):
            members.append(int(stat.parent.name))
    return members
