"""CUDA IPC: another process on the same GPU reads exported memory by its handle; no byte goes by the host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.gpu.items.context import Context, Figures, gigabytes_per_second

CONSUMER = Path(__file__).parents[1] / "programs/ipc_consumer.py"
NUM_BYTES = 2**29  # a bucket of the weight sync
TIMEOUT_S = 50


def exported(context: Context) -> Figures:
    """The buffers of a colocated weight sync."""
    import torch

    from megatron_vespo.weight_sync.exported_memory import ExportedMemory

    memory = ExportedMemory(NUM_BYTES, torch.device("cuda", torch.cuda.current_device()))
    memory.bytes.random_(0, 256)
    expected = int(memory.bytes.sum(dtype=torch.int64))
    torch.cuda.synchronize()
    command = [sys.executable, str(CONSUMER), memory.handle, str(NUM_BYTES)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
    memory.close()
    if done.returncode:
        raise RuntimeError(f"the other process: {done.stderr.decode(errors='replace')[-1000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["sum"] == expected, f"the other process has read something else: {told}"
    return {
        "handle bytes": len(memory.handle),
        "open ms": told["open_ms"],
        "copy ms": told["copy_ms"],
        "copy GB/s, read and written": gigabytes_per_second(2 * NUM_BYTES, told["copy_ms"]),
    }
