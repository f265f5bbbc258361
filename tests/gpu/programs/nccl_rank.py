"""A rank of an NCCL group, all of them on the first GPU: seconds and bytes of the communicator, a sum."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist

from tests.distributed.programs.common import hand_back

NUM_BYTES = 2**28


def main() -> None:
    torch.cuda.set_device(0)
    tensor = torch.randn(NUM_BYTES // 4, device="cuda")
    expected = tensor.clone()
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    dist.init_process_group("nccl", init_method="env://")
    dist.all_reduce(tensor)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    held = free - torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    for _ in range(10):
        dist.broadcast(tensor, 0)
        dist.all_reduce(tensor)
    torch.cuda.synchronize()
    hand_back(**{
        "right": dist.get_world_size() > 1 or torch.equal(tensor, expected),
        "version": np.array(".".join(map(str, torch.cuda.nccl.version()))),
        "start seconds": first,
        "bytes of the communicator": held,
        "broadcast and sum ms": 1e2 * (time.perf_counter() - start),
    })  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
