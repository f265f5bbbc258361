"""Runs one rank of an all-reduce between processes, in a process that may hang or die.

    python -m megatron_vespo.commands.doctor.collective BACKEND HOST PORT RANK WORLD_SIZE DEVICE_INDEX SECONDS

The last line of rank 0 is JSON: bandwidth in GB/s and latency in ms. Any exit but 0 is a failure.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vespo.system.plugins import load_runtime_plugins

PAYLOAD_BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
REPETITIONS = 5


def main(backend: str, host: str, port: int, rank: int, size: int, device_index: int, seconds: float) -> None:
    device = torch.device("cuda", device_index) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"tcp://{host}:{port}", rank=rank, world_size=size,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    latency = _seconds(torch.ones(1, device=device), size)
    payload = torch.ones(PAYLOAD_BYTES[backend] // 4, device=device)
    # bytes over the slowest link of a ring, for what NCCL's own tests call bus bandwidth
    moved = 2 * (size - 1) / size * PAYLOAD_BYTES[backend]
    bandwidth = moved / _seconds(payload, size) / 1e9
    dist.barrier()
    if rank == 0:
        print("\n" + json.dumps({"gb_per_s": bandwidth, "ms": latency * 1e3}), flush=True)
    dist.destroy_process_group()


def _seconds(tensor: torch.Tensor, size: int) -> float:
    """Seconds of one all-reduce. It follows a warm-up all-reduce whose sum must be right."""
    dist.all_reduce(tensor)
    if not bool((tensor == size).all()):
        raise RuntimeError(f"the sum of {size} ones is {tensor.max().item():g}")
    _wait(tensor)
    started = time.monotonic()
    for _ in range(REPETITIONS):
        dist.all_reduce(tensor)
    _wait(tensor)
    return (time.monotonic() - started) / REPETITIONS


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    load_runtime_plugins()
    name, address, *numbers, limit = sys.argv[1:]
    main(name, address, *map(int, numbers), float(limit))  # pyright: ignore[reportCallIssue]
