"""What one trainer rank gives back of its GPU, part by part, as the driver counts it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from tests.distributed.programs.common import hand_back, start_policy


def free_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def seconds(function: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    policy, samples = start_policy()
    from megatron_vespo.trainer.memory import GpuMemory, storages

    memory = GpuMemory(policy.model, policy.optimizer, offload_states=True)
    gradients_only = GpuMemory(policy.model, policy.optimizer, offload_states=False)
    tensors = {"optimizer": memory._optimizer_tensors, "weights": memory._weight_tensors}
    offload = {
        "gradients": lambda: gradients_only.offload(keep_weights=True),
        "optimizer": memory.optimizer.offload,
        "weights": memory.weights.offload,
    }

    def copies() -> list[torch.Tensor]:
        return [tensor.detach().cpu().clone() for each in tensors.values() for tensor in each()]

    def step() -> float:
        mini_batch = policy.pack(samples)
        policy.compute_old_log_probs(mini_batch)
        return policy.train_step(mini_batch).loss

    losses = [step()]
    before = copies()
    sizes = {name: sum(storage.nbytes() for storage in storages(each())) for name, each in tensors.items()}
    buffers = [b for chunk in policy.model for b in chunk.buffers + chunk.expert_parallel_buffers]
    sizes["gradients"] = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
    results: dict[str, object] = {f"{name}: bytes": size for name, size in sizes.items()}
    for _ in range(2):  # the first turn also allocates and pins the host's memory
        for name, function in offload.items():
            free = free_bytes()
            results[f"{name}: seconds"] = seconds(function)
            results[f"{name}: freed"] = free_bytes() - free
        results["back: seconds"] = seconds(memory.onload)
    pairs = zip(before, copies(), strict=True)
    results["restored"] = all(torch.equal(then, now) for then, now in pairs)
    losses.append(step())
    hand_back(losses=losses, **results)


if __name__ == "__main__":
    main()
