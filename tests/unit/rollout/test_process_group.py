"""Which processes of an engine's group still run."""

import os
import signal
import subprocess
import sys

from megatron_vespo.rollout.sglang_server import group_members

# The main thread ends alone (exit, not exit_group), as when threads of a killed process end one by one.
THREADS_END_LATER = """
import ctypes, socket, threading, time
held = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=time.sleep, args=(60,)).start()
print(held.getsockname()[1], flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


def test_a_process_whose_main_thread_has_ended_still_runs():
    process = subprocess.Popen(
        [sys.executable, "-c", THREADS_END_LATER], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None and int(process.stdout.readline()) > 0
        with open(f"/proc/{process.pid}/stat") as stat:
            while stat.read().rpartition(")")[2].split()[0] != "Z":
                stat.seek(0)
        assert group_members(process.pid) == [process.pid]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
    assert group_members(process.pid) == []
