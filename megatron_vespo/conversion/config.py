"""HF config.json -> the Megatron arguments that describe the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vespo.conversion import qwen3_moe


def read_hf_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of an HF checkpoint folder of a supported architecture; ValueError otherwise."""
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--hf-checkpoint {checkpoint}: no config.json there; it must be an HF checkpoint folder"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--hf-checkpoint: {path} is not JSON: {error}") from error
    found = (config.get("architectures") or ["none"])[0]
    if found != qwen3_moe.ARCHITECTURE:
        raise ValueError(f"--hf-checkpoint {checkpoint} is a {found}; supported: {qwen3_moe.ARCHITECTURE}")
    return config


def megatron_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Megatron argument names (argparse destinations) and values that the HF config determines.

    Raises ValueError for a config whose mathematics these arguments cannot express, or that lacks a number.
    """
    _refuse_unsupported(config)
    try:
        return _arguments(config)
    except KeyError as error:
        raise ValueError(f"--hf-checkpoint: config.json has no {error.args[0]}") from error


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        # transformers 4 calls it num_experts
        "num_experts": config["num_experts" if "num_experts" in config else "num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rotary_base": int(rope.get("rope_theta", config.get("rope_theta", 10000))),
        "max_position_embeddings": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        # what every Qwen3-MoE has in common
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
    }


def _refuse_unsupported(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000))
    refusals = [
        (theta != int(theta), f"rope_theta {theta}, not a whole number"),
        (kind not in (None, "default"), f"rope type {kind!r}"),
        (bool(config.get("use_sliding_window")), "sliding-window attention"),
        (bool(config.get("attention_bias")), "attention_bias"),
        (bool(config.get("tie_word_embeddings")), "tied embeddings"),
        (bool(config.get("mlp_only_layers")), "mlp_only_layers (dense layers between MoE layers)"),
        (config.get("decoder_sparse_step", 1) != 1, "decoder_sparse_step other than 1"),
        (not config.get("norm_topk_prob", False), "norm_topk_prob false"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act {config.get('hidden_act')!r}"),
    ]
    for refused, what in refusals:
        if refused:
            raise ValueError(f"--hf-checkpoint: config.json asks for {what}, which is not supported")
