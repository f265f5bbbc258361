"""Copies tensors between host memory and a device asynchronously.

An asynchronous copy needs pinned host memory. Torch caches the blocks that it has pinned, and reuses a block
only after the copies from it have ended.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`. Copies to a GPU use a pinned block, so only some tensors are pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy in host memory that shares no memory with the tensor.

    A copy from a GPU is in pinned memory. `to_device` may take it at once; read it only after a synchronize.
    """
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
