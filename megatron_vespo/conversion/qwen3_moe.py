"""Qwen3MoeForCausalLM: the table of parameter names and the Megatron arguments its config stands for.

Names on the left are Megatron's, with global layer and expert numbers; both the local and the
Transformer-Engine layer specs are covered (they differ in where the norms and the experts live).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vespo.conversion.mappings import QKV, Direct, GatedMLP, Mapping, Vocabulary

ARCHITECTURE = "Qwen3MoeForCausalLM"


@dataclass(frozen=True)
class ModelShape:
    """The numbers the table needs."""

    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int


def _layer(rest: str) -> str:
    return rf"decoder\.layers\.(?P<layer>\d+)\.{rest}"


def _expert(linear: str) -> str:
    local = rf"local_experts\.(?P<expert>\d+)\.{linear}\.weight"
    return _layer(rf"mlp\.experts\.({local}|{linear}\.weight(?P<expert_te>\d+))")


# Megatron name (full match) -> mapping; {layer} and {expert} in the HF names come from the match
_TABLE: list[tuple[str, Callable[[str, ModelShape], Mapping]]] = [
    (r"embedding\.word_embeddings\.weight", lambda h, s: _vocabulary("model.embed_tokens.weight", s)),
    (r"output_layer\.weight", lambda h, s: _vocabulary("lm_head.weight", s)),
    (r"decoder\.final_layernorm\.weight", lambda h, s: Direct(("model.norm.weight",), None)),
    (
        _layer(r"(input_layernorm\.weight|self_attention\.linear_qkv\.layer_norm_weight)"),
        lambda h, s: Direct((h + "input_layernorm.weight",), None),
    ),
    (_layer(r"self_attention\.linear_qkv\.weight"), lambda h, s: _qkv(h + "self_attn.", s)),
    (
        _layer(r"self_attention\.q_layernorm\.weight"),
        lambda h, s: Direct((h + "self_attn.q_norm.weight",), None),
    ),
    (
        _layer(r"self_attention\.k_layernorm\.weight"),
        lambda h, s: Direct((h + "self_attn.k_norm.weight",), None),
    ),
    (
        _layer(r"self_attention\.linear_proj\.weight"),
        lambda h, s: Direct((h + "self_attn.o_proj.weight",), 1),
    ),
    (
        _layer(r"pre_mlp_layernorm\.weight"),
        lambda h, s: Direct((h + "post_attention_layernorm.weight",), None),
    ),
    (_layer(r"mlp\.router\.weight"), lambda h, s: Direct((h + "mlp.gate.weight",), None)),
    (_expert("linear_fc1"), lambda h, s: GatedMLP((h + "gate_proj.weight", h + "up_proj.weight"))),
    (_expert("linear_fc2"), lambda h, s: Direct((h + "down_proj.weight",), 1)),
]
_COMPILED = [(re.compile(pattern), build) for pattern, build in _TABLE]


def mapping_for(megatron_name: str, shape: ModelShape) -> Mapping:
    """The mapping of one Megatron parameter; KeyError for a name the family does not have."""
    for pattern, build in _COMPILED:
        match = pattern.fullmatch(megatron_name)
        if match:
            return build(_hf_prefix(match), shape)
    raise KeyError(f"{ARCHITECTURE} has no parameter {megatron_name}")


def is_expert(megatron_name: str) -> bool:
    """Whether the parameter is sharded over the expert groups instead of the dense ones."""
    return ".mlp.experts." in megatron_name


def _hf_prefix(match: re.Match) -> str:
    found = match.groupdict()
    if "layer" not in found:
        return ""
    prefix = f"model.layers.{found['layer']}."
    if "expert" in found:
        prefix += f"mlp.experts.{found['expert'] or found['expert_te']}."
    return prefix


def _vocabulary(name: str, shape: ModelShape) -> Vocabulary:
    return Vocabulary((name,), 0, vocab_size=shape.vocab_size, padded_vocab_size=shape.padded_vocab_size)


def _qkv(prefix: str, shape: ModelShape) -> QKV:
    return QKV(
        tuple(f"{prefix}{x}_proj.weight" for x in "qkv"),
        num_query_groups=shape.num_query_groups,
        heads_per_group=shape.num_attention_heads // shape.num_query_groups,
        head_dim=shape.head_dim,
    )
