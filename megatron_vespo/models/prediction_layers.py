"""Layers for multi-token prediction (arXiv 2404.19737) that a checkpoint has behind the model's own.

They predict tokens after the next one, for speculative decoding. They are no part of the policy: log-probs do
not depend on them. They are neither trained nor exported, because a policy that has moved on makes them
worse guesses. What is written here says in config.json that it has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FIELD = "num_nextn_predict_layers"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def is_of_prediction_layer(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the HF tensor belongs to one of those that `config` counts."""
    match = _LAYER.match(name)
    first, number = config["num_hidden_layers"], config.get(FIELD) or 0
    return match is not None and first <= int(match[1]) < first + number


def without_prediction_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of the same model without them."""
    return {**config, **({FIELD: 0} if config.get(FIELD) else {})}
