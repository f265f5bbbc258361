"""Functions of Megatron-Core 0.19.2 that need CUDA beyond what torch_cuda stands in for."""

from __future__ import annotations

import logging
from typing import Any

import megatron.core.datasets.utils as dataset_utils
import megatron.core.tensor_parallel.random as megatron_random
import megatron.core.transformer.moe.moe_utils as moe_utils
import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
import torch

from megatron_vespo_cpu.replace import replace


def install() -> None:
    # The tracker of random states sets the device's generator in a callback that waits until CUDA is
    # initialised, which is never: without this, a fork of the random state does nothing, silently.
    replace(megatron_random, "_get_cuda_rng_state", _get_rng_state)
    replace(megatron_random, "_set_cuda_rng_state", _set_rng_state)
    # One generator plays both parts, so a fork always changes "the CPU's" too.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    original = moe_utils.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """The original leaves CPU tensors alone, but the split sizes of an all-to-all must become numbers."""
        moved = original(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    for module in (moe_utils, token_dispatcher):
        replace(module, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu)
    # It runs make; the wheel brings the compiled helpers and no Makefile.
    replace(dataset_utils, "compile_helpers", lambda: None)


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)
