"""Finds the part of the model that holds a parameter, by its Megatron name with a global layer number."""

from __future__ import annotations

import re

from megatron_vespo.models.table import is_expert

PARTS = ("embedding", "attention", "router", "experts", "mlp", "norms", "output")
THIRDS = ("first_third", "middle_third", "last_third")
GRADIENT_GROUPS = (*PARTS, *THIRDS)  # each parameter is in one part; those in layers are also in one third
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def part_of(name: str) -> str:
    """Return one of PARTS; `mlp` is for dense layers. Transformer Engine puts some norms in linear layers."""
    if "layernorm" in name or "layer_norm" in name:
        return "norms"
    if is_expert(name) or ".mlp.shared_experts." in name:
        return "experts"
    for mark, part in (
        (".mlp.router.", "router"),
        (".mlp.", "mlp"),
        (".self_attention.", "attention"),
        ("embedding.", "embedding"),
        ("output_layer.", "output"),
    ):
        if mark in name:
            return part
    raise KeyError(f"parameter {name} belongs to no part of the model")


def third_of(name: str, num_layers: int) -> str | None:
    """Return the third of the layers, one of THIRDS; None for a parameter outside the layers."""
    match = _LAYER.match(name)
    return THIRDS[3 * int(match[1]) // num_layers] if match else None
