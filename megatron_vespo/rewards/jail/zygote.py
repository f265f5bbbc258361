"""A warm interpreter in a closed root, forked for every program into namespaces of its own.

    reward worker --socket--> zygote --fork--> guard --fork--> program (process 1 of its pid namespace)

The guard lives outside of the program's namespaces. It waits for the program's end or for the end of the
`life` pipe, which the reward worker holds, and then kills the program: the kernel ends everything in a pid
namespace with its process 1. If the guard itself is killed, the kernel kills the program.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_vespo.rewards.jail import call_filter, kernel, program, root, tester

_PRELOADED = """
    array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq io
    itertools json math numbers operator queue random re statistics string sys threading time types typing
    numpy
""".split()
_FD_LIMIT = 64
_TASK_LIMIT = 32  # threads, all of the one process
_STACK_BYTES = 64 * 2**20
_INSIDE_ID = 1000
_CHANNEL_FD, _RESULTS_FD = 3, 4
_ALL_NAMESPACES = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One program to start; the message brings file descriptors along: life, status, and those of its role.

    role "script": source, stdin, stdout. "program": JSON list of sources, channel.
    "tester": tests, channel, results.
    """

    role: str
    cpu_s: int
    memory_bytes: int  # that it may allocate, beyond the interpreter's own
    scratch_bytes: int  # of its folder, and of any one file
    call_timeout_s: float = 0.0  # of a tester
    stop_at_failure: bool = False  # of a tester


def main(socket_fd: int) -> None:
    """Prepare the root, say {"ready": true} or {"error": why}, then start programs until the socket ends."""
    connection = socket.socket(fileno=socket_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reward worker decides
    try:
        zygote = _Zygote()
    except Exception as error:
        connection.send(json.dumps({"error": getattr(error, "strerror", None) or str(error)}).encode())
        return
    connection.send(b'{"ready": true}')
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 65536, 8)
        if not message:
            return
        zygote.start(Request(**json.loads(message)), fds)
        for fd in fds:
            os.close(fd)


class _Zygote:
    def __init__(self) -> None:
        self._filter = call_filter.filter_instructions()
        kernel.join_new_keyring()
        _preload()
        root.enter_outer_user_namespace()
        self._proc = root.enter_read_only_root()
        os.umask(0o022)
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # guards become no zombies

    def start(self, request: Request, fds: list[int]) -> None:
        if os.fork() == 0:
            with _reported(fds[1]):
                _guard(request, fds, self._proc, self._filter)


def _preload() -> None:
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(name)


def _guard(request: Request, fds: list[int], proc: int, instructions: bytes) -> None:
    """Start the program and report {"exit": status, "cpu_s": seconds} when nothing of it is left."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    life, status, *own = fds
    root.become_nobody()
    outside = os.geteuid(), os.getegid()
    kernel.unshare(_ALL_NAMESPACES)
    root.map_one_identity(proc, inside=(_INSIDE_ID, _INSIDE_ID), outside=outside)
    options = f"size={request.scratch_bytes},nr_inodes=1k,mode=777"
    kernel.mount("none", root.SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    alive, held = os.pipe()  # ends when this process does
    child = os.fork()
    if child == 0:
        with _reported(status):
            os.close(held)
            run = _become_program(request, own, status, alive, proc, instructions)
        try:
            os._exit(run())
        finally:
            os._exit(1)  # whatever a program raises, it never returns into the zygote's code
    for fd in own:
        os.close(fd)
    _wait_for_end(child, life)
    _, wait_status, usage = os.wait4(child, 0)
    report = {"exit": os.waitstatus_to_exitcode(wait_status), "cpu_s": usage.ru_utime + usage.ru_stime}
    os.write(status, json.dumps(report).encode() + b"\n")
    os._exit(0)


@contextlib.contextmanager
def _reported(status: int) -> Iterator[None]:
    """Report an exception as {"error": why} and end the process."""
    try:
        yield
    except BaseException as error:
        os.write(status, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        os._exit(1)


def _wait_for_end(child: int, life: int) -> None:
    """Wait until the child has ended, or kill it when the life pipe ends."""
    child_fd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(child_fd, select.POLLIN)
    poll.register(life, select.POLLHUP)
    ready = dict(poll.poll())
    if child_fd not in ready:
        os.kill(child, signal.SIGKILL)


def _become_program(
    request: Request, own: list[int], status: int, alive: int, proc: int, instructions: bytes
) -> Callable[[], int]:
    """Close the sandbox around this process; return what runs the program and gives the exit status."""
    kernel.set_process_option(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([alive], [], [], 0)[0]:
        raise RuntimeError("the guard ended before it could be watched")
    os.setsid()
    os.chdir(root.SCRATCH)
    _choose_for_out_of_memory(proc)
    _limit(request, _address_space(proc))
    source = _read_all(own[0])
    wanted = [*own[1:], None] if request.role == "script" else [None, None, None, *own[1:]]
    _arrange_descriptors([*wanted, status])
    kernel.set_process_option(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.set_process_option(kernel.PR_SET_DUMPABLE, 0)
    kernel.drop_capabilities()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kernel.install_filter(instructions)
    os.close(len(wanted))  # the status: from here on it belongs to the guard alone
    return partial(_run, request, source)


def _run(request: Request, source: str) -> int:
    if request.role == "script":
        return program.run_script(source)
    if request.role == "program":
        program.serve_functions(json.loads(source), _CHANNEL_FD)
        return 0
    results = tester.run_tests(
        json.loads(source), _CHANNEL_FD, request.call_timeout_s, request.stop_at_failure
    )
    tester.report(results, _RESULTS_FD)
    return 0


def _choose_for_out_of_memory(proc: int) -> None:
    """Let the kernel end this process first if the machine's memory is full."""
    file = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc)
    os.write(file, b"1000")
    os.close(file)


def _address_space(proc: int) -> int:
    """Bytes that the interpreter itself has mapped."""
    file = os.open("self/statm", os.O_RDONLY, dir_fd=proc)
    pages = int(os.read(file, 200).split()[0])
    os.close(file)
    return pages * os.sysconf("SC_PAGE_SIZE")


def _limit(request: Request, address_space: int) -> None:
    limits = {
        resource.RLIMIT_AS: address_space + request.memory_bytes,
        resource.RLIMIT_CPU: request.cpu_s,
        resource.RLIMIT_FSIZE: request.scratch_bytes,
        resource.RLIMIT_NOFILE: _FD_LIMIT,
        resource.RLIMIT_NPROC: _TASK_LIMIT,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    for kind, limit in limits.items():
        _, allowed = resource.getrlimit(kind)
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        resource.setrlimit(kind, (limit, limit))


def _read_all(fd: int) -> str:
    with open(fd, encoding="utf-8", errors="replace", closefd=False) as file:
        return file.read()


def _arrange_descriptors(wanted: Sequence[int | None]) -> None:
    """Make `wanted` the descriptors from 0 on and close all others; None is /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    copies = [fcntl.fcntl(null if fd is None else fd, fcntl.F_DUPFD, _FD_LIMIT // 2) for fd in wanted]
    for target, copy in enumerate(copies):
        os.dup2(copy, target)
    os.closerange(len(wanted), os.sysconf("SC_OPEN_MAX"))
