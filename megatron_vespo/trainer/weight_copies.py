"""Copies this rank's weights to host memory, and runs the model with such copies in their place.

The weights are what this rank holds of the model at any layout, complete over data parallelism: the
parameters, then the routers' biases, which are buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.training.training import force_param_sync
from torch import Tensor

from megatron_vespo.trainer.weights import ROUTER_BIAS


def weights_of(model: list) -> list[Tensor]:
    """The weights themselves, in an order that does not change."""
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    buffers = [buffer for chunk in model for buffer in chunk.named_buffers()]
    return parameters + [buffer for name, buffer in buffers if name.endswith(ROUTER_BIAS)]


def copies(model: list) -> list[Tensor]:
    """Copies of `weights_of` in host memory."""
    return [tensor.detach().to("cpu", copy=True) for tensor in weights_of(model)]


def completes(model: list, optimizer, overlaps_param_gather: bool) -> Callable[[], None]:
    """What completes the weights: with the overlap a rank has only its part until the next forward pass."""
    return (lambda: force_param_sync(model, optimizer)) if overlaps_param_gather else (lambda: None)


@contextmanager
def swapped(model: list, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the model has other weights; afterwards its own are restored bit for bit, even after an error.

    Parameters are views into the buffers of gradient reduction and optimizer, so they are written to, never
    replaced. Take no optimizer step inside.
    """
    with restored(model):
        _write(model, tensors)
        yield


@contextmanager
def restored(model: list) -> Iterator[None]:
    """Afterwards the model has the weights again that it has now."""
    own = copies(model)
    try:
        yield
    finally:
        _settle(model)
        _write(model, own)


def _settle(model: list) -> None:
    """Wait for parameters in transfer from other ranks: they would overwrite the restored weights."""
    for chunk in model:
        for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            if bucket_group.param_gather_handle is not None:
                bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)


@torch.no_grad()
def _write(model: list, tensors: Sequence[Tensor]) -> None:
    for weight, tensor in zip(weights_of(model), tensors, strict=True):
        weight.copy_(tensor)
