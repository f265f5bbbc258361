"""Glm4MoeForCausalLM: GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7.

Layers: the first few are dense, the others have routed experts and shared ones. A router scores experts by
sigmoids. It chooses those with the largest score + e_score_correction_bias, and weighs them by the score
alone (DeepSeek-V3, arXiv 2412.19437, equation 16).

The bias is frozen in RL. Pre-training moves it by a rule of its own, which evens out the load of its batches
and is no gradient of any loss. That rule would change the policy between two optimizer steps behind the
loss's back: W compares the policy with the one that generated. So nothing trains the bias, Megatron's rule
does not run, and it is exported as it was loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_vespo.models import pieces
from megatron_vespo.models.prediction_layers import FIELD
from megatron_vespo.models.table import Family, ModelShape, Parameter

_PARTIAL = "partial_rotary_factor"
_DEFAULT_PARTIAL = 0.5  # of transformers' Glm4MoeConfig
_SIZES = {
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
}


def _has_bias(shape: ModelShape, layer: int) -> bool:
    return shape.qkv_bias


def _has_norms(shape: ModelShape, layer: int) -> bool:
    return shape.qk_norm


def _is_dense(shape: ModelShape, layer: int) -> bool:
    return layer < shape.dense_layers


def _has_experts(shape: ModelShape, layer: int) -> bool:
    return layer >= shape.dense_layers


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    layers, dense = config["num_hidden_layers"], _whole(config, "first_k_dense_replace")
    if dense >= layers:
        raise ValueError(f"first_k_dense_replace is {dense}, must be below num_hidden_layers {layers}")
    if _whole(config, "n_shared_experts") == 0:
        raise ValueError("n_shared_experts is 0, must be a positive integer")
    _whole(config, FIELD, default=0)
    scale = config.get("routed_scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e6:
        raise ValueError(f"routed_scaling_factor is {scale!r}, must be a positive number")
    return {
        # a list, even one without zeros, makes Megatron store every layer under a name of its own
        **({"moe_layer_freq": [0] * dense + [1] * (layers - dense)} if dense else {}),
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "moe_router_topk_scaling_factor": float(scale),
        "rotary_percent": _rotary_percent(config),
        "add_qkv_bias": _flag(config, "attention_bias"),
        "qk_layernorm": _flag(config, "use_qk_norm"),
    }


def _rotary_percent(config: dict[str, Any]) -> float:
    """transformers 4 has it beside rope_theta, transformers 5 in rope_parameters."""
    given = [
        place[_PARTIAL]
        for place in (config.get("rope_parameters") or {}, config)
        if place.get(_PARTIAL) is not None
    ]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(f"{_PARTIAL} is {given[1]!r}, but in rope_parameters {given[0]!r}")
    percent = given[0] if given else _DEFAULT_PARTIAL
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 < percent <= 1:
        raise ValueError(f"{_PARTIAL} is {percent!r}, must be above 0, at most 1")
    rotated = config["head_dim"] * percent
    if rotated != int(rotated) or int(rotated) % 2:
        raise ValueError(f"{_PARTIAL} {percent} of head_dim {config['head_dim']} is no even number")
    return float(percent)


def _whole(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{field} is {value!r}, must be an integer, 0 or more")
    return value


def _flag(config: dict[str, Any], field: str) -> bool:
    value = config.get(field)
    if not isinstance(value, bool):
        raise ValueError(f"{field} is {value!r}, must be true or false")
    return value


def _only(rows: tuple[Parameter, ...], exists) -> tuple[Parameter, ...]:
    return tuple(replace(row, exists=exists) for row in rows)


FAMILY = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    table=(
        pieces.WORD_EMBEDDINGS,
        pieces.INPUT_NORM,
        *pieces.ATTENTION,
        *_only((pieces.QKV_BIAS,), _has_bias),
        *_only(pieces.QUERY_KEY_NORMS, _has_norms),
        *_only(pieces.FIRST_DENSE_MLP, _is_dense),
        *_only((*pieces.EXPERTS_MLP, *pieces.SHARED_EXPERTS_MLP, pieces.ROUTER_BIAS), _has_experts),
        pieces.FINAL_NORM,
        pieces.OUTPUT,
    ),
    sizes=_SIZES,
    constants={
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
    },
    arguments=_arguments,
    reads={
        _PARTIAL, "attention_bias", "use_qk_norm", "first_k_dense_replace", "n_shared_experts",
        "routed_scaling_factor", FIELD,
    },
    # one group of experts is no restriction; Megatron scores several groups in another way than transformers
    neutral={"norm_topk_prob": True, "n_group": 1, "topk_group": 1},
    required={
        "norm_topk_prob", "num_key_value_heads", "head_dim", "attention_bias", "use_qk_norm",
        "first_k_dense_replace", "n_shared_experts", "routed_scaling_factor", "num_hidden_layers",
    },
    harmless={"router_aux_loss_coef", "output_router_logits"},
)  # fmt: skip
