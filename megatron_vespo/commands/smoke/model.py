"""Writes a small random Qwen3-MoE as an HF checkpoint: the tensors of Qwen3-30B-A3B, in few layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_vespo.commands.smoke.fit import Wanted
from megatron_vespo.models.family import family_of, shape_of

MIN_LAYERS = 2
# for GPUs: a layer of Qwen3-30B-A3B with half of its experts
FULL = {
    "hidden_size": 2048, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4,
    "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 4096,
}  # fmt: skip
# for CPUs: the same, with all sizes smaller
SCALED_DOWN = {
    "hidden_size": 128, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
    "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512,
}  # fmt: skip


def config_for(layout: Wanted, on_gpus: bool, max_length: int) -> dict[str, Any]:
    """config.json of a model that the layout can divide; none of its tokens ends a completion."""
    sizes = dict(FULL if on_gpus else SCALED_DOWN)
    widest = max(layout.tp, layout.engine_size)
    sizes["num_key_value_heads"] = max(sizes["num_key_value_heads"], widest)
    sizes["num_attention_heads"] = max(sizes["num_attention_heads"], widest)
    sizes["num_experts"] = math.lcm(sizes["num_experts"], layout.ep)
    stages = layout.pp * layout.vpp
    return sizes | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": stages * math.ceil(MIN_LAYERS / stages),
        "intermediate_size": 3 * sizes["hidden_size"],  # of dense layers; there are none
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "max_position_embeddings": max_length,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(folder: Path, dtype: torch.dtype, seed: int) -> int:
    """Writes random weights for `folder`'s config; returns bytes written.

    Norms are about 1. The other weights give logits a standard deviation of 1, so different weights change
    log-probs by far more than rounding.
    """
    config = json.loads((folder / "config.json").read_text())
    draw = torch.Generator().manual_seed(seed)
    deviation = config["hidden_size"] ** -0.5

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return (1 + torch.randn(shape, generator=draw) / 10).to(dtype)
        return (torch.randn(shape, generator=draw) * deviation).to(dtype)

    tensors = {name: values(shape) for name, shape in family_of(config).hf_tensors(shape_of(config)).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
