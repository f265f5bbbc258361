"""How SGLang is told to build the layers of a block-FP8 checkpoint and to wait for their weights.

It loads nothing: the first weight sync brings everything. FP8 layers compute in 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_vespo.checkpoints.block_fp8 import quantisation_config

DTYPE = "bfloat16"
_CONFIG, _LOADING = "--json-model-override-args", "--load-format"
# SGLang's flags that would build or load other layers
FP8_FLAGS = (_CONFIG, _LOADING, "--quantization", "--model-impl")


def fp8_arguments(hf_tensors: Mapping[str, Any]) -> list[str]:
    """SGLang's flags for a model of these HF tensors, whose checkpoint is not quantised."""
    config = {"quantization_config": quantisation_config(hf_tensors)}
    return [_LOADING, "dummy", _CONFIG, json.dumps(config, separators=(",", ":"))]
