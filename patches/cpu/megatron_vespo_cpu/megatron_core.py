"""Functions of Megatron-Core 0.19.2 that need CUDA beyond what torch_cuda stands in for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import megatron.core.tensor_parallel.mappings as mappings
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
    replace(
        mappings, "_gather_along_first_dim", _with_uneven_parts(mappings._gather_along_first_dim, _gather)
    )
    replace(
        mappings,
        "_reduce_scatter_along_first_dim",
        _with_uneven_parts(mappings._reduce_scatter_along_first_dim, _reduce_scatter),
    )


def _with_uneven_parts(original: Callable, uneven: Callable) -> Callable:
    """Expert tensor parallelism gathers and scatters parts of different sizes, which gloo cannot."""

    def along_first_dim(
        input_: torch.Tensor,
        group: Any,
        split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if split_sizes is None or group.size() == 1:
            return original(input_, group, split_sizes, use_global_buffer)
        return uneven(input_, group, [int(size) for size in split_sizes])

    return along_first_dim


def _gather(input_: torch.Tensor, group: Any, split_sizes: list[int]) -> torch.Tensor:
    padded = input_.new_zeros(max(split_sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in split_sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, split_sizes, strict=True)])


def _reduce_scatter(input_: torch.Tensor, group: Any, split_sizes: list[int]) -> torch.Tensor:
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return total.split(split_sizes)[group.rank()].clone()


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)
