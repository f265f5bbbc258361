"""CUDA IPC: another process on the same GPU reads a tensor by its handle; no byte goes by the host."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

from tests.gpu.items.context import Context, Figures, gigabytes_per_second

CONSUMER = Path(__file__).parents[1] / "programs/ipc_consumer.py"
NUM_BYTES = 2**29  # a bucket of the weight sync
TIMEOUT_S = 50
# where torch.multiprocessing.reductions puts the device's index among the arguments of its rebuild function
DEVICE = 6


def plain(context: Context) -> Figures:
    """Memory of cudaMalloc, as torch takes it unless told otherwise."""
    figures = _share()
    assert figures["equal"], f"the other process has read something else: {figures}"
    return figures


def expandable(context: Context) -> Figures:
    """Memory of expandable segments, which not every torch and kernel can share: a figure only."""
    try:
        return _share()
    except (RuntimeError, AssertionError) as error:
        return {"equal": False, "error": str(error)[-500:]}


def handle_of(tensor) -> bytes:
    """Pickled: the function that rebuilds the tensor, and its arguments with the GPU by its UUID.

    The other process may count its GPUs otherwise.
    """
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    function, arguments = reduce_tensor(tensor)
    assert arguments[DEVICE] == tensor.device.index, "torch has moved the device's index"
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return pickle.dumps((function, (*arguments[:DEVICE], uuid, *arguments[DEVICE + 1 :])))


def _share() -> Figures:
    import torch

    tensor = torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    handle = handle_of(tensor)
    command = [sys.executable, str(CONSUMER)]
    done = subprocess.run(command, input=handle, capture_output=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"the other process: {done.stderr.decode(errors='replace')[-1000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return {
        "equal": told["sum"] == int(tensor.sum(dtype=torch.int64)),
        "handle bytes": len(handle),
        "open ms": told["open_ms"],
        "copy ms": told["copy_ms"],
        "copy GB/s, read and written": gigabytes_per_second(2 * NUM_BYTES, told["copy_ms"]),
    }
