"""Finds the supported model family and the model shape that an HF config describes."""

from __future__ import annotations

from typing import Any

from megatron_vespo.models import glm4_moe, llama, qwen3, qwen3_moe
from megatron_vespo.models.config_fields import arguments_of
from megatron_vespo.models.table import Family, ModelShape, is_expert

__all__ = ["FAMILIES", "Family", "ModelShape", "family_of", "is_expert", "shape_of"]

FAMILIES = {
    family.architecture: family for family in (qwen3_moe.FAMILY, glm4_moe.FAMILY, qwen3.FAMILY, llama.FAMILY)
}

_NO_LINEAR_ATTENTION = (
    "its linear attention has no engine without a GPU (SGLang 0.5.23 calls AMX's "
    "fused_sigmoid_gating_delta_rule_update_cpu), so no engine has been compared with a trainer"
)
_NO_LATENT_ATTENTION = (
    "its latent attention (MLA) has no engine without a GPU (SGLang 0.5.23's torch_native reads the "
    "latent cache as keys of heads), so no engine has been compared with a trainer"
)
# architectures that people will try, and why a run of them could not be trusted
REFUSED = {
    "DeepseekV2ForCausalLM": _NO_LATENT_ATTENTION,
    "DeepseekV3ForCausalLM": _NO_LATENT_ATTENTION,
    "Qwen3NextForCausalLM": _NO_LINEAR_ATTENTION,
    "Qwen3_5ForCausalLM": _NO_LINEAR_ATTENTION,
    "Qwen3_5ForConditionalGeneration": _NO_LINEAR_ATTENTION,
    "Qwen3_5MoeForCausalLM": _NO_LINEAR_ATTENTION,
    "Qwen3_5MoeForConditionalGeneration": _NO_LINEAR_ATTENTION,
}


def family_of(hf_config: dict[str, Any]) -> Family:
    """Return the family that config.json names; ValueError if it is not supported."""
    architectures = hf_config.get("architectures")
    found = str(architectures[0]) if isinstance(architectures, list) and architectures else "none"
    if found in REFUSED:
        raise ValueError(f"its architecture is {found}, which is refused: {REFUSED[found]}")
    if found not in FAMILIES:
        raise ValueError(f"its architecture is {found}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[found]


def shape_of(hf_config: dict[str, Any], padded_vocab_size: int | None = None) -> ModelShape:
    """Return the model's shape; ValueError if the config is not supported.

    `padded_vocab_size` None: no padding, as in HF.
    """
    arguments = arguments_of(hf_config, family_of(hf_config))
    experts = arguments["num_experts"] or 0
    return ModelShape(
        num_layers=arguments["num_layers"],
        hidden_size=arguments["hidden_size"],
        ffn_hidden_size=arguments["moe_ffn_hidden_size" if experts else "ffn_hidden_size"],
        num_experts=experts,
        num_attention_heads=arguments["num_attention_heads"],
        num_query_groups=arguments["num_query_groups"],
        head_dim=arguments["kv_channels"],
        vocab_size=arguments["vocab_size"],
        padded_vocab_size=padded_vocab_size or arguments["vocab_size"],
        tied_embeddings=not arguments["untie_embeddings_and_output_weights"],
        dense_layers=arguments.get("moe_layer_freq", []).count(0),
        dense_ffn_hidden_size=arguments["ffn_hidden_size"] if experts else 0,
        shared_ffn_hidden_size=arguments.get("moe_shared_expert_intermediate_size") or 0,
        qkv_bias=arguments["add_qkv_bias"],
        qk_norm=arguments["qk_layernorm"],
    )
