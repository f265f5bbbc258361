"""Loads HF-named weights into a Megatron model and exports them as full tensors, both by one table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.models.family import Family, ModelShape, is_expert
from megatron_vespo.models.mappings import Direct, Mapping
from megatron_vespo.models.part import ModelPart
from megatron_vespo.models.table import EMBEDDING, FINAL_NORM, OUTPUT_LAYER

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
ROUTER_BIAS = ".mlp.router.expert_bias"
_LOCAL_EXPERT = re.compile(r"(local_experts\.|linear_fc[12]\.weight)(\d+)")


def global_parameters(
    model: GPTModel, groups: ProcessGroupCollection
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters, named with global layer and expert numbers, in the model's order."""
    yield from _with_global_numbers(model.named_parameters(), model, groups)


def global_tensors(model: GPTModel, groups: ProcessGroupCollection) -> Iterator[tuple[str, Tensor]]:
    """All that makes the policy: the parameters and, after them, the routers' biases, which are buffers."""
    yield from global_parameters(model, groups)
    biases = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(ROUTER_BIAS))
    yield from _with_global_numbers(biases, model, groups)


def _with_global_numbers[T: Tensor](
    tensors: Iterable[tuple[str, T]], model: GPTModel, groups: ProcessGroupCollection
) -> Iterator[tuple[str, T]]:
    experts_before = groups.ep.rank() * (model.config.num_moe_experts or 0) // groups.ep.size()
    for name, tensor in tensors:
        match = _LAYER.match(name)
        if match:
            layer_number = model.decoder.layers[int(match[1])].layer_number - 1  # pyright: ignore[reportOperatorIssue]
            name = f"decoder.layers.{layer_number}.{name[match.end() :]}"
        if is_expert(name):
            name = _shift_expert(name, experts_before)
        yield name, tensor


def _shift_expert(name: str, offset: int) -> str:
    return _LOCAL_EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + offset}", name)


def load_hf_weights(
    model: list, family: Family, shape: ModelShape, groups: ProcessGroupCollection, folder: Path
) -> None:
    """Fill every tensor of this rank's model chunks, reading only the tensors that it needs.

    ValueError names a tensor that is missing or has the wrong shape.
    """
    parameters = (named for chunk in unwrap_model(model) for named in global_tensors(chunk, groups))
    with HFCheckpointReader(folder) as reader, torch.no_grad():
        for name, parameter in parameters:
            mapping = family.mapping_for(name, shape)
            group = groups.expt_tp if is_expert(name) else groups.tp
            tensors = [reader.get(hf_name) for hf_name in mapping.hf_names]
            # the checkpoint must hold what an export would write for this parameter
            shards = [parameter.detach().to("meta")] * (1 if _is_replicated(mapping) else group.size())
            for (hf_name, expected), tensor in zip(mapping.merge(shards).items(), tensors, strict=True):
                if tensor.shape != expected.shape:
                    raise ValueError(
                        f"{folder}: tensor {hf_name} is {tuple(tensor.shape)}, by "
                        f"config.json it should be {tuple(expected.shape)}"
                    )
            parameter.copy_(mapping.shard(tensors, group.size())[group.rank()])


def iterate_hf_weights(
    model: GPTModel, family: Family, shape: ModelShape, groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    """Full HF-named tensors of this pipeline stage, gathered over tensor and expert parallelism.

    A collective: all tensor- and expert-parallel ranks of the stage iterate together and get every tensor.
    """
    experts_here = (model.config.num_moe_experts or 0) // groups.ep.size()
    first_expert = groups.ep.rank() * experts_here
    for name, parameter in global_tensors(model, groups):
        if shape.tied_embeddings and name == OUTPUT_LAYER:
            continue  # the last stage's copy of the embedding; the first stage yields it
        mapping = family.mapping_for(name, shape)
        group = groups.expt_tp if is_expert(name) else groups.tp
        local = parameter.detach()
        merged = mapping.merge([local] if _is_replicated(mapping) else _all_gather(local, group))
        if not is_expert(name):
            yield from merged.items()
            continue
        # rank r of the group holds the same local expert of its own range: a gather yields ep.size() experts
        gathered = {hf_name: _all_gather(tensor, groups.ep) for hf_name, tensor in merged.items()}
        for rank in range(groups.ep.size()):
            other_name = _shift_expert(name, rank * experts_here - first_expert)
            names = family.mapping_for(other_name, shape).hf_names
            for theirs, tensors in zip(names, gathered.values(), strict=True):
                yield theirs, tensors[rank]


def held_weights(
    model: GPTModel, family: Family, shape: ModelShape, groups: ProcessGroupCollection
) -> dict[str, Tensor]:
    """This rank's parameters by the first HF tensor that each is made of; views, without the copy of a tied
    embedding.
    """
    return {
        family.mapping_for(name, shape).hf_names[0]: parameter.detach()
        for name, parameter in global_tensors(model, groups)
        if not (shape.tied_embeddings and name == OUTPUT_LAYER)
    }


def model_part(chunks: Sequence[GPTModel], groups: ProcessGroupCollection) -> ModelPart:
    """Which part of the model this rank holds, read from its parameters' names."""
    names = [name for chunk in chunks for name, _ in global_parameters(chunk, groups)]
    number = (chunks[0].config.num_moe_experts or 0) // groups.ep.size()
    first_expert = groups.ep.rank() * number
    return ModelPart(
        layers=frozenset(int(match[1]) for name in names if (match := _LAYER.match(name))),
        first=EMBEDDING in names,
        last=FINAL_NORM in names,
        experts=range(first_expert, first_expert + number),
        tp=(groups.tp.rank(), groups.tp.size()),
        expert_tp=(groups.expt_tp.rank(), groups.expt_tp.size()),
    )


def _is_replicated(mapping: Mapping) -> bool:
    return isinstance(mapping, Direct) and mapping.dim is None


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor, group=group)
    return gathered
