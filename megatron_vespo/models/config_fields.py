"""Translates HF config fields to Megatron arguments and refuses fields that Megatron cannot express."""

from __future__ import annotations

from typing import Any, TypeGuard

from megatron_vespo.models.table import Family

Config = dict[str, Any]

# HF field -> Megatron argument; all values are positive integers
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
# name in the tables -> the other name that transformers 4 or 5 uses
_OTHER_SPELLING = {"num_experts": "num_local_experts"}
_USED_OTHERWISE = {
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters",
    "architectures", "model_type", "layer_types", "quantization_config",
}  # fmt: skip
# HF field -> the only value that Megatron supports; null means the same
_NEUTRAL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
}
_HUGE = 1e300  # larger than any number in a config; the comparison with it also rejects NaN
_MOST_LAYERS = 10**6  # layers times experts: a list of all of them must fit into memory
# these fields do not change what the model computes
_HARMLESS = {
    # names, token ids, how the model was created, loaded or saved
    "_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype",
    "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "prefix", "gradient_checkpointing", "neftune_noise_alpha",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_flash_attn_2_enabled", "attn_implementation", "unsloth_version", "unsloth_fixed", "is_llama_config",
    "transformers.js_config",
    # in every config of transformers 4: outputs, other tasks, encoders and decoders
    "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder",
    "chunk_size_feed_forward", "keys_to_ignore_at_inference",
    # generation defaults, which each request overrides
    "max_length", "min_length", "temperature", "top_p", "top_k", "typical_p", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "remove_invalid_values",
    "output_scores", "return_dict_in_generate",
    # the longest input of a tokenizer or a training script
    "max_sequence_length", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side",
}  # fmt: skip
_ARGUMENTS_OF_ALL = {
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
}
# the values that megatron.core's RotaryEmbedding uses with --use-rope-scaling
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def arguments_of(config: Config, family: Family) -> dict[str, Any]:
    """Return Megatron arguments (argparse destinations); ValueError if they cannot express the config."""
    _check_fields(config, family)
    sizes = {name: _size(config, field) for field, name in (_SIZES | dict(family.sizes)).items()}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    groups = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    _check_divides(groups, "num_key_value_heads", heads, "num_attention_heads")
    if config.get("head_dim") is None:
        _check_divides(heads, "num_attention_heads", hidden, "hidden_size")
        head_dim = hidden // heads
    else:
        head_dim = _size(config, "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, must be even")
    if "num_experts" in sizes and sizes["moe_router_topk"] > sizes["num_experts"]:
        raise ValueError(
            f"num_experts_per_tok {sizes['moe_router_topk']} is more than num_experts {sizes['num_experts']}"
        )
    layers, experts = sizes["num_layers"], sizes.get("num_experts", 1)
    if layers * experts > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers x experts is {layers} x {experts}, more than any model has")
    epsilon: Any = config.get("rms_norm_eps")
    if not _is_number(epsilon) or not 0 < epsilon < 1:
        raise ValueError(f"rms_norm_eps is {epsilon!r}, must be a number between 0 and 1")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {tied!r}, must be true or false")
    return {
        # None for a dense family, so that a flag that asks for experts is a contradiction
        "num_experts": None,
        **sizes,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "layernorm_epsilon": epsilon,
        "untie_embeddings_and_output_weights": not tied,
        **_rope(config, family),
        **_ARGUMENTS_OF_ALL,
        **family.constants,
        **family.arguments(config),
    }


def _check_fields(config: Config, family: Family) -> None:
    if config.get("quantization_config"):
        raise ValueError(
            "quantization_config is there: it is a quantised checkpoint; take the one in bfloat16 or float32"
        )
    if config.get("model_type", family.model_type) != family.model_type:
        raise ValueError(
            f"model_type is {config['model_type']!r}, a {family.architecture} has {family.model_type!r}"
        )
    for field in sorted(family.required):
        if config.get(field) is None:
            raise ValueError(f"{field} is missing")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise ValueError(f"layer_types is {layer_types!r}, supported is full_attention in all layers")
    of_all = {field: value for field, value in _NEUTRAL.items() if field not in family.reads}
    neutral = of_all | dict(family.neutral)
    for field, expected in neutral.items():
        value = config.get(field)
        if value is not None and value != expected:
            raise ValueError(f"{field} is {value!r}, supported is {expected!r}")
    used = _SIZES.keys() | family.sizes.keys() | family.reads | _USED_OTHERWISE
    known = used | {_OTHER_SPELLING.get(name) for name in used} | neutral.keys() | _HARMLESS | family.harmless
    _refuse_unknown({field: value for field, value in config.items() if field not in known})


def _refuse_unknown(fields: Config) -> None:
    for field, value in fields.items():
        if value not in (None, False, 0, [], {}, ""):
            raise ValueError(
                f"{field} is {value!r}: that field may change the mathematics and is not supported; if it "
                "does not, remove it from config.json"
            )


def _size(config: Config, field: str) -> int:
    other = _OTHER_SPELLING.get(field)
    spellings = [name for name in (field, other) if name is not None and name in config]
    if not spellings:
        raise ValueError(f"{field} is missing")
    values = [config[name] for name in spellings]
    if len(values) == 2 and values[0] != values[1]:
        raise ValueError(f"{field} is {values[0]!r}, but {other} is {values[1]!r}")
    if isinstance(values[0], bool) or not isinstance(values[0], int) or values[0] <= 0:
        raise ValueError(f"{spellings[0]} is {values[0]!r}, must be a positive integer")
    return values[0]


def _check_divides(divisor: int, what: str, number: int, of_what: str) -> None:
    if number % divisor:
        raise ValueError(f"{what} {divisor} does not divide {of_what} {number}")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def _rope(config: Config, family: Family) -> dict[str, Any]:
    """transformers 4 has rope_theta and rope_scaling; transformers 5 has both in rope_parameters."""
    rope: Config = {}
    for field in ("rope_scaling", "rope_parameters"):
        given = config.get(field) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{field} is {given!r}, must be an object or null")
        rope |= given
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000))
    if not _is_number(theta) or theta <= 0 or theta != int(theta):
        raise ValueError(f"rope_theta is {theta!r}, must be a positive whole number")
    if config.get("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta is {config['rope_theta']!r}, but in rope_parameters {theta!r}")
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind) or "default"
    factor = 1.0
    if kind == "llama3":
        factor = rope.pop("factor", None)
        if not _is_number(factor) or factor <= 0:
            raise ValueError(f"rope scaling's factor is {factor!r}, must be a positive number")
        for field, expected in _LLAMA3.items():
            value = rope.pop(field, None)
            if value != expected:
                raise ValueError(f"rope scaling's {field} is {value!r}, supported is {expected!r}")
    elif kind != "default":
        raise ValueError(f"rope type is {kind!r}, supported are 'default' and 'llama3'")
    rotated = rope.pop("partial_rotary_factor", 1.0)
    if rotated not in (None, 1.0) and "partial_rotary_factor" not in family.reads:
        raise ValueError("rope_parameters has a partial_rotary_factor, supported is 1.0")
    _refuse_unknown(rope)
    return {
        "rotary_base": int(theta),
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": float(factor),
    }
