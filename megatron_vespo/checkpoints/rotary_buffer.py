"""`rotary_emb.inv_freq`, a buffer that HF checkpoints of 2023 hold though config.json determines it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.models.hf_config import megatron_arguments

_NAME = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# rounding of the stored dtype, and of another order of operations
_RELATIVE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_ABSOLUTE = 1e-7  # the smallest ones are subnormal in float16


def is_rotary_buffer(name: str) -> bool:
    """Whether the HF tensor is such a buffer, of a layer or of the model."""
    return _NAME.fullmatch(name) is not None


def check_rotary_buffer(folder: Path, reader: HFCheckpointReader, name: str, hf_config: dict) -> None:
    """ValueError unless its values are those that the config determines, which are used in their place."""
    arguments = megatron_arguments(hf_config)
    stored = reader.get(name)
    expected = _inverse_frequencies(arguments["rotary_base"], arguments["kv_channels"])
    if arguments["use_rope_scaling"] or stored.dtype not in _RELATIVE or stored.shape != expected.shape:
        same = False
    else:
        same = torch.allclose(stored.float(), expected, rtol=_RELATIVE[stored.dtype], atol=_ABSOLUTE)
    if not same:
        raise ValueError(
            f"{folder}: tensor {name} is not what rope_theta {arguments['rotary_base']} and head_dim "
            f"{arguments['kv_channels']} of config.json make it"
        )


def _inverse_frequencies(theta: float, head_dim: int) -> Tensor:
    """theta^(-2i / head_dim), float32 [head_dim / 2] (arXiv 2104.09864)."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim).float()
