"""Checks that an HF config describes the model that a Megatron checkpoint was saved from.

Shapes do not tell: 4 heads of 64 are as wide as 8 of 32, but query, key and value are interleaved by group.
A checkpoint holds its run's arguments. They are read without creating any object that they name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.chunk_index import ChunkIndex
from megatron_vespo.checkpoints.names import COMMON_STATE
from megatron_vespo.checkpoints.torch_dist_file import SafeUnpickler, read_pickle

# what no shape shows -> the argument without which Megatron ignores it
_COMPARED = {
    "num_attention_heads": None,
    "num_query_groups": "group_query_attention",
    "kv_channels": None,
    "rotary_base": None,
    "use_rope_scaling": None,
    "rope_scaling_factor": "use_rope_scaling",
    "layernorm_epsilon": None,
    "rotary_percent": None,
    "moe_router_topk_scaling_factor": None,
}


class _Saved:
    """Stands for whatever a pickle names; keeps its attributes."""

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def append(self, item: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _ArgumentsUnpickler(SafeUnpickler):
    def find_class(self, module: str, name: str) -> type[_Saved]:
        return type(name, (_Saved,), {})

    def persistent_load(self, saved: Any) -> None:
        return None


def saved_arguments(index: ChunkIndex) -> dict[str, Any]:
    """The arguments of the run that saved it; empty if it holds none. ValueError if it is damaged."""
    place = index.place_of_object(COMMON_STATE)
    if place is None:
        return {}
    text = read_pickle(*place)
    try:
        (state,) = _ArgumentsUnpickler(io.BytesIO(text)).load()
        return dict(vars(state["args"])) if "args" in state else {}
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{place[0]}: the arguments saved at byte {place[1]} are damaged: {error!r}"
        ) from error


def check_same_model(index: ChunkIndex, config: Path, arguments: Mapping[str, Any]) -> None:
    """ValueError naming an argument whose value differs between the checkpoint and the HF config."""
    saved = saved_arguments(index)
    for name, switch in _COMPARED.items():
        if switch and not saved.get(switch):
            continue
        if name in saved and name in arguments and saved[name] != arguments[name]:
            raise ValueError(
                f"{config}: {name} is {arguments[name]!r}, {index.folder} was saved with {saved[name]!r}"
            )
