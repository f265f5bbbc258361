"""Opens memory by its handle, copies it, and prints sums and times as JSON."""

from __future__ import annotations

import json
import sys
import time

import torch

from megatron_vespo.weight_sync.exported_memory import opened


def main() -> None:
    handle, size = sys.argv[1:]
    torch.cuda.init()
    start = time.perf_counter()
    shared = opened(handle, int(size), torch.device("cuda", 0))
    open_ms = 1e3 * (time.perf_counter() - start)
    target = torch.empty_like(shared)
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(shared)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    told = {"sum": int(target.sum(dtype=torch.int64)), "open_ms": open_ms, "copy_ms": sorted(times)[2]}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
