"""A trainer of one rank that holds a whole model, read from an HF folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vespo.models.family import Family, ModelShape, family_of, shape_of
from megatron_vespo.models.part import ModelPart
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact import ExactSource
from megatron_vespo.weight_sync.places import Place, place_of
from megatron_vespo.weight_sync.trainer_layout import TrainerShard


def model_of(folder: Path) -> tuple[Family, ModelShape]:
    config = json.loads((folder / "config.json").read_text())
    return family_of(config), shape_of(config)


def whole(shape: ModelShape) -> ModelPart:
    layers, experts = frozenset(range(shape.num_layers)), range(shape.num_experts)
    return ModelPart(layers, first=True, last=True, experts=experts, tp=(0, 1), expert_tp=(0, 1))


def exact_source(
    folder: Path, host: str, layout: EngineLayout, buffer_bytes: int, place: Place | None = None
) -> ExactSource:
    """`place` may be made up."""
    family, shape = model_of(folder)
    device = torch.device("cpu")
    shard = TrainerShard(0, place or place_of(device), whole(shape))
    return ExactSource(family, shape, shard, layout, torch.float32, device, buffer_bytes, host)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def held_weights(folder: Path) -> Mapping[str, Tensor]:
    """Its Megatron parameters by the first HF tensor of each."""
    family, shape = model_of(folder)
    tensors = tensors_of(folder)
    held = {}
    for row, numbers in family.rows(shape):
        names = tuple(name.format(**numbers) for name in row.tensors)
        [held[names[0]]] = row.build(names, shape).shard([tensors[name] for name in names], 1)
    return held
