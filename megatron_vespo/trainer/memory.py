"""What a trainer rank gives back of its GPU while an engine on it generates; weights and optimizer stay."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer


def give_memory_back(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """The buffers of the gradients, and what torch has cached. Between optimizer steps."""
    on_gpu = torch.cuda.is_available()
    optimizer.zero_grad()  # parts of them that it holds
    for chunk in chunks:
        chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=False)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def take_memory(chunks: Sequence[DistributedDataParallel]) -> None:
    """Buffers for gradients again, where they have been given back; all zeros."""
    for chunk in chunks:
        chunk.restore_grad_buffers(synchronize=False)
