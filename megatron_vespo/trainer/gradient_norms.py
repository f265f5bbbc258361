"""Computes gradient norms of parameters and of model parts, the same numbers on every layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_vespo.models.parameter_groups import GRADIENT_GROUPS, part_of, third_of
from megatron_vespo.trainer.initialize import device
from megatron_vespo.trainer.weights import global_parameters


def gradient_norms(
    model_chunks: Sequence[DistributedDataParallel], groups: ProcessGroupCollection
) -> dict[str, float]:
    """L2 norm of every parameter's whole gradient, by its name with global layer and expert numbers.

    Call it after the backward pass, when gradients are reduced, and before the optimizer step, which
    clips them in place. A collective of all ranks; all get the same result. Sums are float64. The root of the
    sum of all squares is the norm that Megatron clips by.
    """
    counted = [_counted(chunk, groups) for chunk in model_chunks]
    names = [name for parameters in counted for name in parameters]
    mine = list(zip(names, _squares(model_chunks, counted).tolist(), strict=True))
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    totals: dict[str, float] = defaultdict(float)
    for part in everywhere:
        for name, square in part:
            totals[name] += square
    return {name: math.sqrt(total) for name, total in sorted(totals.items())}


class GroupGradientNorms:
    """L2 norms of the gradients of GRADIENT_GROUPS. Which parameters form a group is found out once."""

    def __init__(
        self, model_chunks: Sequence[DistributedDataParallel], groups: ProcessGroupCollection, num_layers: int
    ):
        self._model_chunks = model_chunks
        self._counted = [_counted(chunk, groups) for chunk in model_chunks]
        names = [name for counted in self._counted for name in counted]
        members = [
            (GRADIENT_GROUPS.index(group), parameter)
            for parameter, name in enumerate(names)
            for group in (part_of(name), third_of(name, num_layers))
            if group is not None
        ]
        table = torch.tensor(members, dtype=torch.int64, device=device()).view(-1, 2)
        self._group_indices, self._parameters = table.unbind(1)

    def __call__(self) -> Tensor:
        """Return the norms, float64 [10] on the device, 0 for a group that the model lacks.

        Call it when and where `gradient_norms` is called. It needs one small reduction. The squares of PARTS
        add up to the square of the whole norm.
        """
        squares = _squares(self._model_chunks, self._counted)
        totals = squares.new_zeros(len(GRADIENT_GROUPS))
        totals.index_add_(0, self._group_indices, squares[self._parameters])
        dist.all_reduce(totals)
        return totals.sqrt()


def _counted(chunk: DistributedDataParallel, groups: ProcessGroupCollection) -> dict[str, torch.nn.Parameter]:
    """The parameters whose gradients this rank counts: one that several ranks hold is counted on one."""
    return {
        name: parameter
        for name, parameter in global_parameters(unwrap_model(chunk), groups)  # pyright: ignore[reportArgumentType]
        if param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter, groups.tp, groups.expt_tp)
    }


def _squares(
    model_chunks: Sequence[DistributedDataParallel], counted: Sequence[dict[str, torch.nn.Parameter]]
) -> Tensor:
    """Squared norms, float64, of this rank's parts of the `counted` parameters' gradients, in their order."""
    squares: list[Tensor] = []
    for chunk, parameters in zip(model_chunks, counted, strict=True):
        shards = _owned_gradients(chunk)
        squares += [
            torch.linalg.vector_norm(shards[parameter], dtype=torch.float64).square()
            for parameter in parameters.values()
        ]
    return torch.stack(squares) if squares else torch.zeros(0, dtype=torch.float64, device=device())


def _owned_gradients(chunk: DistributedDataParallel) -> dict[torch.nn.Parameter, Tensor]:
    """The flat part of every parameter's reduced gradient that this rank holds; the part may be empty.

    The distributed optimizer reduce-scatters each bucket into equal parts. Rank r of the buffer's
    data-parallel group holds sums only in the r-th part.
    """
    config = chunk.ddp_config
    assert config.use_distributed_optimizer and config.num_distributed_optimizer_instances == 1
    shards = {}
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:  # pyright: ignore[reportGeneralTypeIssues]
        rank, size = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
        for bucket in buffer.buckets:
            length = bucket.grad_data.numel()
            assert length % size == 0, (length, size)
            first, last = rank * length // size, (rank + 1) * length // size
            for parameter, (start, end) in bucket.param_to_index.items():
                begin = max(start, first)
                shards[parameter] = bucket.grad_data.view(-1)[begin : max(begin, min(end, last))]
    return shards
