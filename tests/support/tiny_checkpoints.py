"""Tiny random checkpoints on disk, without building a model, and the command run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vespo.commands import main as cli
from megatron_vespo.models.family import FAMILIES, family_of, shape_of

MOE, QWEN3, LLAMA = "Qwen3MoeForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"
GLM = "Glm4MoeForCausalLM"
_NUMBERS = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 6, "norm_topk_prob": True}
_GLM = {
    "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 6, "norm_topk_prob": True,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "attention_bias": True,
    "use_qk_norm": True,
}  # fmt: skip
_MORE = {MOE: _EXPERTS, GLM: _GLM}


def tiny_config(architecture: str, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        **_NUMBERS,
        **_MORE.get(architecture, {}),
        **changes,
    }


def random_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Norms are not all the same, so that a lost or exchanged one is noticed.

    Routers' biases are float32, as in published checkpoints.
    """
    generator = torch.Generator().manual_seed(seed)
    family, shape = family_of(config), shape_of(config)
    fixed = family.fixed_tensors(shape)
    return {
        name: (torch.rand(size, generator=generator) + 0.5).to(torch.float32 if name in fixed else dtype)
        for name, size in family.hf_tensors(shape).items()
    }


def write_hf(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], num_files: int = 1) -> Path:
    """An HF folder: single, or sharded with an index. Files are written by the safetensors library."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        part = dict(list(tensors.items())[number::num_files])
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def convert(*words: object) -> int:
    """`megatron-vespo convert ...`: the exit code."""
    command, *rest = map(str, words)
    quiet = [] if command == "inspect" else ["--quiet"]
    return cli.run(["convert", command, *rest, *quiet])
