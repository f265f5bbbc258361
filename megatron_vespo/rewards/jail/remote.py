"""Tests functions of a program where no namespaces can be made: on a sandbox server, in one run of a script.

The server isolates the script from its machine. What is left is to keep the program from its own tests. It
runs in a process that is forked before the tests are read, and that may not look into its parent. The verdict
follows a nonce that only the parent has read.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

from megatron_vespo.rewards.jail import kernel, program, tester


def main(sources: list[str]) -> None:
    """Run `sources`. stdin: JSON of nonce, tests, call_timeout_s, stop_at_failure. Print nonce, results."""
    kernel.set_process_option(kernel.PR_SET_DUMPABLE, 0)  # the program cannot read this process
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            _become_program(sources, theirs)
        finally:
            os._exit(1)
    theirs.close()
    request = json.load(sys.stdin)
    results = tester.run_tests(
        request["tests"], ours.fileno(), request["call_timeout_s"], request["stop_at_failure"]
    )
    text = "".join("1" if passed else "0" for passed in results)
    with contextlib.suppress(OSError):
        os.kill(child, signal.SIGKILL)
    print(f"\n{request['nonce']}{text}", flush=True)


def _become_program(sources: list[str], channel: socket.socket) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    kernel.set_process_option(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.set_process_option(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.drop_capabilities()  # those of root allow to read any process
    program.serve_functions(sources, channel.fileno())
