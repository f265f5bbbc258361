"""Tensors between host memory and a device, without waiting for either.

A copy that nobody waits for needs pinned host memory. Torch keeps pinned blocks that it has pinned once, and
hands a block out again only after the copies from it have ended.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; on a GPU through a pinned block, so that only a part of them is pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, which shares nothing with the tensor.

    From a GPU into pinned memory: it may be handed to `to_device`, but read only after a synchronization.
    """
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
