"""Main module of an engine's process group: runs SGLang's server, which ends with its starting process.

    python -m megatron_vespo.rollout.server_process PARENT_PID SGLANG_ARGUMENTS...

A guard process in its own session kills the whole group as soon as the starting process or this one ends, for
whatever reason. PR_SET_PDEATHSIG is not enough. It reaches only this process, not SGLang's children, and it
fires when the starting *thread* ends, which in an actor may be long before its process.

Standard input is one line with the server's API key, or an empty line.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys

from megatron_vespo.rollout.api_key import keep_out_of_logs, receive


def _start_guard(parent_pid: int) -> None:
    """Forks the guard before SGLang's threads exist. The guard keeps only the log file open."""
    server_pid = os.getpid()
    watched = [os.pidfd_open(server_pid), os.pidfd_open(parent_pid)]
    if os.fork() == 0:
        os.setsid()
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor, select.POLLIN)  # readable when the process has ended
        poll.poll()
        try:
            os.killpg(server_pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended already
        os._exit(0)
    for descriptor in watched:
        os.close(descriptor)


def main() -> None:
    assert os.getpgrp() == os.getpid(), "the server must lead its own process group"
    parent_pid = int(sys.argv.pop(1))
    _start_guard(parent_pid)
    if os.getppid() != parent_pid:
        sys.exit(f"process {parent_pid}, which wanted this server, has ended")
    if (api_key := receive(sys.stdin)) is not None:
        keep_out_of_logs(api_key)
        # One word, because a key may begin with a dash. /proc shows the original arguments, without the key.
        sys.argv.append(f"--api-key={api_key}")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
