"""Checks all-reduces between the processes of a step, or between processes of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.commands.doctor.meeting import Meeting
from megatron_vespo.system.ports import find_free_port

TIMEOUT_S = 120.0
EXCHANGE_S = TIMEOUT_S + 60.0  # some are late, because they waited for a failed all-reduce
SLOW_GB_S = {"gloo": 0.05, "nccl": 5.0}
FIXES = {
    "gloo": "GLOO_SOCKET_IFNAME: the cluster's interface (ip -br addr); a host name must not be 127.0.1.1",
    "nccl": "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME, NCCL_IB_HCA choose the network",
}


def all_reduce(meeting: Meeting, backend: str, workers: int, host: str) -> Finding | None:
    """`workers` processes of this task take part; all tasks call it. None if no task has any.

    `host` is rank 0's address as the others reach it. All tasks must be present: otherwise it would hang.
    """
    name = f"{backend} all-reduce"
    port = find_free_port("127.0.0.1" if meeting.size == 1 else "0.0.0.0") if meeting.rank == 0 else 0
    told = meeting.exchange({"port": port, "workers": workers}, EXCHANGE_S)
    if meeting.absent:
        return Finding(name, "FAIL", "not tried: processes are missing") if workers else None
    counts = [told[rank]["workers"] for rank in range(meeting.size)]
    size = sum(counts)
    if size < 2 or workers == 0:
        return None
    first = sum(counts[: meeting.rank])
    status, text, errors = _run(backend, host, told[0]["port"], range(first, first + workers), size)
    if status != 0:
        reason = "no end" if status is None else errors
        return Finding(name, "FAIL", f"{size} processes, {reason}", FIXES[backend])
    if meeting.rank != 0:
        return Finding(name, "ok", "")  # rank 0 has the figures
    measured = json.loads(text.splitlines()[-1])
    gb_per_s = measured["gb_per_s"]
    said = f"{size} processes, {gb_per_s:.2f} GB/s, {measured['ms']:.2f} ms"
    if gb_per_s < SLOW_GB_S[backend]:
        return Finding(name, "warn", f"{said}: slow", FIXES[backend])
    return Finding(name, "ok", said)


def _run(backend: str, host: str, port: int, ranks: range, size: int) -> tuple[int | None, str, str]:
    """Exit status (None: killed at the deadline), the first rank's output, last line of the error."""
    program = [sys.executable, "-m", "megatron_vespo.commands.doctor.collective", backend, host, str(port)]
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ranks]
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ranks]
        processes = [
            subprocess.Popen(
                [*program, str(rank), str(size), str(index), str(TIMEOUT_S / 2)],
                stdin=subprocess.DEVNULL, stdout=outputs[index], stderr=errors[index],
            )
            for index, rank in enumerate(ranks)
        ]  # fmt: skip
        deadline = time.monotonic() + TIMEOUT_S
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        statuses = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
        bad = next((index for index, status in enumerate(statuses) if status != 0), None)
        if bad is None:
            outputs[0].seek(0)
            return 0, outputs[0].read().strip(), ""
        errors[bad].seek(0)
        lines = [line.strip() for line in errors[bad] if "Error" in line] or ["it said nothing"]
        return statuses[bad], "", lines[-1]
