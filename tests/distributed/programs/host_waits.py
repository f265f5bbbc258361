"""Where an optimizer step waits for the device, by function: of half the samples, and of all of them.

On a CPU nothing waits. What would wait on a GPU is counted: every call that brings a tensor's values to the
host. Boundaries of packs, `cu_seqlens`, are in host memory and do not count.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter

import numpy as np
import torch
from common import hand_back, start_policy
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.random_task import random_supports

READING_OPERATORS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
READING_METHODS = ("cpu", "tolist", "numpy")  # of tensors on the host they call no operator


class Waits(TorchDispatchMode):
    """Counts reads of tensors by the function of this package, or else of Megatron, that makes them."""

    def __init__(self, on_host: set[int]):
        super().__init__()
        self._on_host = on_host
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # an index by a mask looks for its true elements
        mask = func is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        if func in READING_OPERATORS or mask:
            self.places[self._place()] += 1
        return func(*args, **kwargs or {})

    def __enter__(self) -> Waits:
        self._originals = {name: getattr(torch.Tensor, name) for name in READING_METHODS}
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, self._counted(original))
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)

    def _counted(self, original):
        def read(tensor, *arguments, **options):
            if tensor.data_ptr() not in self._on_host:
                self.places[self._place()] += 1
            return original(tensor, *arguments, **options)

        return read

    @staticmethod
    def _place() -> str:
        for frame in reversed(traceback.extract_stack()):
            for package in ("megatron_vespo/", "site-packages/megatron/"):
                if package in frame.filename:
                    return f"{frame.filename.partition(package)[1:][1]}:{frame.name}"
        return "elsewhere"


def waits_of_a_step(policy, samples) -> tuple[int, Counter[str]]:
    mini_batch = policy.pack(samples)
    packs = mini_batch.micro_batches
    policy.compute_old_log_probs(mini_batch)
    policy.train_step(mini_batch)  # the first step makes what later ones reuse
    # `.cpu()` of a tensor on the host is the tensor, and so is its `.numpy()`
    host = {pack.cu_seqlens.data_ptr() for pack in packs}
    with Waits(host) as waits:
        policy.train_step(mini_batch)
    return len(packs), waits.places


def main() -> None:
    policy, samples = start_policy()
    samples = random_supports(samples)
    from megatron_vespo.algorithms import segments

    segments.in_host_memory = lambda tensor: False  # as on a GPU
    results = {}
    for name, chosen in (("half", samples[: len(samples) // 2]), ("whole", samples)):
        number, places = waits_of_a_step(policy, chosen)
        results[name] = np.array([number, json.dumps(places)])
    hand_back(**results)


if __name__ == "__main__":
    main()
