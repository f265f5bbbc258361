"""Main module of an engine's process group: SGLang's server, tied to the life of the process that started it.

    python -m megatron_vespo.rollout.server_process PARENT_PID SGLANG_ARGUMENTS...

Whatever ends first, the starting process or this one, and however it ends, a guard in a session of its own
kills the whole group. PR_SET_PDEATHSIG would not do: it reaches only this process, not SGLang's children, and
it fires when the starting *thread* ends, which in an actor may be long before its process.

Standard input is a line with the API key that the server is to ask for, or nothing.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys

from megatron_vespo.rollout.api_key import keep_out_of_logs, receive


def _start_guard(parent_pid: int) -> None:
    """Fork it now, before SGLang's threads exist; it holds no file of ours open but the log."""
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
            pass  # all gone already
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
        # one word, as a key may begin with a dash; /proc shows what the process was started with, not this
        sys.argv.append(f"--api-key={api_key}")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
