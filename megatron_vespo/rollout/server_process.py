"""Main module of an engine's process group: SGLang's server, tied to the life of the process that started it.

    python -m megatron_vespo.rollout.server_process PARENT_PID SGLANG_ARGUMENTS...

PR_SET_PDEATHSIG would tie it to the starting *thread*, which in an actor may end long before its process;
so a thread here watches the parent's process id instead. SGLang's own children die with this process.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

POLL_INTERVAL_S = 0.5


def _die_with(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_INTERVAL_S)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    assert os.getpgrp() == os.getpid(), "the server must lead its own process group"
    parent_pid = int(sys.argv.pop(1))
    threading.Thread(target=_die_with, args=(parent_pid,), daemon=True).start()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
