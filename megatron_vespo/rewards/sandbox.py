"""Runs programs in Linux namespaces: without network, files, other processes, or more than their limits."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.rewards.jail.root import SCRATCH
from megatron_vespo.rewards.jail.zygote import Request

_START_DEADLINE_S = 60.0  # the first import of numpy from a slow disk
_END_DEADLINE_S = 10.0  # from the kill of a program to the end of its namespaces
_PACKAGE_FOLDER = str(Path(__file__).parents[2])
_ZYGOTE_COMMAND = """
import sys
sys.path.insert(0, sys.argv[2])
from megatron_vespo.rewards.jail.zygote import main
sys.path.remove(sys.argv[2])
main(int(sys.argv[1]))
"""
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": SCRATCH,
    "TMPDIR": SCRATCH,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program's reward is the same every time
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # an arena of each thread would take address space, which is limited
}
_MAX_TESTS, _MAX_REPORT = 2**20, 4096  # bytes
_TRIAL = "import colorsys\nprint(6 * 7)"  # a module that the zygote has not loaded
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Limits:
    """Limits of one program."""

    cpu_s: float = 5.0  # also of the time between a call of its function and the answer
    memory_bytes: int = 512 * 2**20  # that it may allocate
    scratch_bytes: int = 16 * 2**20  # of its files
    output_bytes: int = 4 * 2**20  # that are read; a program that writes more is ended


@dataclass(frozen=True)
class ScriptResult:
    """What a script did. `stdout` has at most Limits.output_bytes bytes."""

    status: Literal["ended", "timeout", "output"]  # "output": it wrote more than it may
    exit_status: int | None  # minus the signal's number if a signal ended it; None unless status is "ended"
    stdout: bytes


class SandboxError(Exception):
    """The sandbox itself failed; it is not the program's fault."""


class Sandbox:
    """Starts programs one at a time. Everything that a program started has ended when a method returns.

    Raises:
        ValueError: the kernel does not let this process make namespaces.
    """

    def __init__(self) -> None:
        self._process, self._connection = _start_zygote()
        self.close = weakref.finalize(self, _stop_zygote, self._process, self._connection)
        try:
            deadline = time.monotonic() + _START_DEADLINE_S
            result = self.run_script(_TRIAL, "", Limits(), deadline)
        except SandboxError as error:
            raise _refused(str(error)) from error
        if result.stdout != b"42\n":
            raise _refused("a program cannot import Python's own modules: its folder must be readable by all")

    def run_script(self, source: str, stdin: str, limits: Limits, deadline: float) -> ScriptResult:
        """Run `source` as a script with this input until time.monotonic() reaches `deadline`."""
        with contextlib.ExitStack() as stack:
            stdout, write_end = _pipe(stack)
            inputs = _file_of(source, stack), _file_of(stdin, stack)
            guard = self._start(_request("script", limits), [*inputs, write_end], stack)
            write_end.close()
            output = _read(stdout, limits.output_bytes, deadline)
            if output.whole:
                report = guard.report(deadline)
                if report is not None:
                    return ScriptResult("ended", report["exit"], output.content)
            guard.end()
            status = "output" if len(output.content) >= limits.output_bytes else "timeout"
            return ScriptResult(status, None, output.content)

    def run_tests(
        self, sources: list[str], tests: dict, limits: Limits, deadline: float, *, call_timeout_s: float,
        stop_at_failure: bool,
    ) -> list[bool]:  # fmt: skip
        """Test functions of `sources`: whether each test passed, without those that were not run.

        `tests` have the form that jail/tester.py describes. The sources share a namespace. The
        program has `call_timeout_s` for each call.
        """
        with contextlib.ExitStack() as stack:
            results, write_end = _pipe(stack)
            sides = [stack.enter_context(side) for side in socket.socketpair()]
            request = _request("program", limits)
            program = self._start(request, [_file_of(json.dumps(sources), stack), sides[0]], stack)
            request = _request("tester", limits, call_timeout_s, stop_at_failure)
            inputs = [_file_of(json.dumps(tests), stack), sides[1], write_end]
            tester = self._start(request, inputs, stack)
            for end in (*sides, write_end):
                end.close()
            output = _read(results, _MAX_TESTS, deadline)
            for guard in (program, tester):
                guard.end()
        passed = [byte == ord("1") for byte in output.content.removesuffix(b".")]
        return passed if output.content.endswith(b".") else [*passed, False]  # the last test was not finished

    def _start(self, request: Request, files: list[Any], stack: contextlib.ExitStack) -> _Guard:
        life_end, life = _pipe(stack)
        status, status_end = _pipe(stack)
        fds = [file.fileno() for file in (life_end, status_end, *files)]
        try:
            socket.send_fds(self._connection, [json.dumps(asdict(request)).encode()], fds)
        except OSError as error:
            raise SandboxError(
                f"the sandbox's zygote has ended, exit status {self._process.poll()}"
            ) from error
        life_end.close()
        status_end.close()
        return _Guard(life, status)


@dataclass
class _Guard:
    """The worker's end of a running program."""

    life: io.FileIO
    status: io.FileIO

    def report(self, deadline: float) -> dict | None:
        """Wait for the program's end; None if it is not there at the deadline."""
        output = _read(self.status, _MAX_REPORT, deadline)
        if not output.whole:
            return None
        if not output.content:
            raise SandboxError("the sandbox's guard could not run the program")
        report = json.loads(output.content.splitlines()[0])
        if "error" in report:
            raise SandboxError(f"the sandbox could not start the program: {report['error']}")
        return report

    def end(self) -> None:
        """Kill the program and wait until nothing is left of it."""
        self.life.close()
        if self.report(time.monotonic() + _END_DEADLINE_S) is None:
            raise SandboxError(f"a killed program is still there after {_END_DEADLINE_S:g} s")


@dataclass(frozen=True)
class _Output:
    content: bytes
    whole: bool  # all writers have closed


def _read(file: io.FileIO, max_bytes: int, deadline: float) -> _Output:
    """Read until the end of the pipe, at most `max_bytes` bytes, until the deadline."""
    parts, size = [], 0
    while size < max_bytes:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([file], [], [], left)[0]:
            return _Output(b"".join(parts), whole=False)
        part = os.read(file.fileno(), min(max_bytes - size, 2**18))
        if not part:
            return _Output(b"".join(parts), whole=True)
        parts.append(part)
        size += len(part)
    return _Output(b"".join(parts), whole=False)


def _request(
    role: str, limits: Limits, call_timeout_s: float = 0.0, stop_at_failure: bool = False
) -> Request:
    cpu_s = math.ceil(limits.cpu_s)
    return Request(role, cpu_s, limits.memory_bytes, limits.scratch_bytes, call_timeout_s, stop_at_failure)


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    """(read end, write end), which the stack closes."""
    read_end, write_end = os.pipe()
    return stack.enter_context(io.FileIO(read_end, "r")), stack.enter_context(io.FileIO(write_end, "w"))


def _file_of(text: str, stack: contextlib.ExitStack) -> io.FileIO:
    """A file in memory that nobody can change any more."""
    file = stack.enter_context(
        io.FileIO(os.memfd_create("text", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+")
    )
    unwritten = memoryview(text.encode(errors="replace"))
    while unwritten:
        unwritten = unwritten[file.write(unwritten) :]
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    return file


def _start_zygote() -> tuple[subprocess.Popen, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-c", _ZYGOTE_COMMAND, str(theirs.fileno()), _PACKAGE_FOLDER],
            env=_ENVIRONMENT,
            cwd="/",
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    ours.settimeout(_START_DEADLINE_S)
    try:
        message = json.loads(ours.recv(65536) or b'{"error": "the process ended"}')
        ours.settimeout(None)
    except TimeoutError:
        message = {"error": f"not ready after {_START_DEADLINE_S:g} s"}
    if "error" in message:
        _stop_zygote(process, ours)
        raise _refused(message["error"])
    return process, ours


def _refused(why: str) -> ValueError:
    return ValueError(
        f"no sandbox for code rewards: {why}; the kernel must allow user namespaces to this user (a "
        "container may forbid them), or --code-sandbox-url must name a sandbox server"
    )


def _stop_zygote(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
