"""What engines would hold after a plan of the exact sync was carried out with a policy's real parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.plan import make_plan
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from tests.support.sync_layouts import engine_weights

ENGINES = [EngineLayout(1), EngineLayout(2), EngineLayout(2, 2)]
BUFFER_BYTES = 20_000


def wrong_shards(policy) -> list[str]:
    """Parameters of engines that would not be those of the policy's HF checkpoint; a collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shards: list[Any] = [None] * world
    dist.all_gather_object(shards, TrainerShard(rank, Place("h", "h"), policy.part))
    held = policy.held_weights()
    hf = {
        name: tensor
        for file in policy.args.hf_checkpoint.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    wrong = []
    for layout in ENGINES:
        plan = make_plan(policy.family, policy.shape, shards, layout, 4, BUFFER_BYTES)
        mine = []
        for number, piece in enumerate(plan.pieces):
            if piece.source == rank:
                matrix = held[piece.tensor].view(len(held[piece.tensor]), -1)
                rows = slice(piece.row, piece.row + piece.rows)
                mine.append((number, matrix[rows, piece.col : piece.col + piece.cols].clone()))
        everybodys: list[Any] = [None] * world
        dist.all_gather_object(everybodys, mine)
        found = _assembled(plan, dict(sum(everybodys, [])))
        for engine_rank, parameters in enumerate(found):
            expected = engine_weights(hf, policy.shape, engine_rank, layout.tp, layout.ep)
            assert parameters.keys() == expected.keys()
            wrong += [
                f"{name} on rank {engine_rank} of {layout}"
                for name, tensor in expected.items()
                if not parameters[name].equal(tensor.view(len(tensor), -1))
            ]
    return wrong


def _assembled(plan, values: dict[int, Tensor]) -> list[dict[str, Tensor]]:
    found = [
        {name: torch.full(size, torch.nan) for name, size in of_rank.items()} for of_rank in plan.matrices
    ]
    for number, piece in enumerate(plan.pieces):
        target = found[piece.engine_rank][piece.parameter]
        rows = slice(piece.to_row, piece.to_row + piece.rows)
        target[rows, piece.to_col : piece.to_col + piece.cols] = values[number]
    for fill in plan.padding:
        found[fill.engine_rank][fill.parameter][fill.to_row : fill.to_row + fill.rows] = 0
    return found
