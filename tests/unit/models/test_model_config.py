"""HF config.json -> Megatron arguments."""

import json
import math

import pytest

from megatron_vespo.models.hf_config import megatron_arguments, read_hf_config
from tests.support.published_config import GLM_4_5, LLAMA3_ROPE, LLAMA_1B, QWEN3_8B, QWEN3_30B_A3B

ALL = {
    "group_query_attention": True, "position_embedding_type": "rope", "normalization": "RMSNorm",
    "swiglu": True, "add_bias_linear": False, "add_qkv_bias": False, "num_attention_heads": 32,
}  # fmt: skip
QWEN3 = ALL | {
    "kv_channels": 128, "layernorm_epsilon": 1e-6, "rotary_base": 1000000, "use_rope_scaling": False,
    "rope_scaling_factor": 1.0, "max_position_embeddings": 40960, "vocab_size": 151936,
    "untie_embeddings_and_output_weights": True, "qk_layernorm": True,
}  # fmt: skip
EXPECTED = QWEN3 | {
    "num_layers": 48, "hidden_size": 2048, "ffn_hidden_size": 6144, "num_query_groups": 4, "num_experts": 128,
    "moe_router_topk": 8, "moe_ffn_hidden_size": 768, "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
}  # fmt: skip
EXPECTED_8B = QWEN3 | {
    "num_layers": 36, "hidden_size": 4096, "ffn_hidden_size": 12288, "num_query_groups": 8,
    "num_experts": None,
}  # fmt: skip
EXPECTED_1B = ALL | {
    "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_query_groups": 8, "kv_channels": 64,
    "num_experts": None, "layernorm_epsilon": 1e-5, "rotary_base": 500000, "use_rope_scaling": True,
    "rope_scaling_factor": 32.0, "max_position_embeddings": 131072, "vocab_size": 128256,
    "untie_embeddings_and_output_weights": False, "qk_layernorm": False,
}  # fmt: skip
EXPECTED_GLM = ALL | {
    "num_layers": 92, "hidden_size": 5120, "ffn_hidden_size": 12288, "num_attention_heads": 96,
    "num_query_groups": 8, "kv_channels": 128, "layernorm_epsilon": 1e-5, "rotary_base": 1000000,
    "use_rope_scaling": False, "rope_scaling_factor": 1.0, "rotary_percent": 0.5,
    "max_position_embeddings": 131072, "vocab_size": 151552, "untie_embeddings_and_output_weights": True,
    "qk_layernorm": True, "add_qkv_bias": True, "num_experts": 160, "moe_router_topk": 8,
    "moe_ffn_hidden_size": 1536, "moe_shared_expert_intermediate_size": 1536,
    "moe_layer_freq": [0] * 3 + [1] * 89, "moe_router_topk_scaling_factor": 2.5,
    "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0,
}  # fmt: skip
MODELS = {
    "GLM-4.5": (GLM_4_5, EXPECTED_GLM),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, EXPECTED),
    "Qwen3-8B": (QWEN3_8B, EXPECTED_8B),
    "Llama-3.2-1B": (LLAMA_1B, EXPECTED_1B),
}
each_model = pytest.mark.parametrize(("config", "expected"), MODELS.values(), ids=MODELS)


def without(*keys: str, config: dict = QWEN3_30B_A3B) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def message_of(config: dict) -> str:
    with pytest.raises(ValueError) as error:
        megatron_arguments(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@each_model
def test_as_transformers_4_wrote_it(config, expected):
    assert megatron_arguments(config) == expected


@each_model
def test_as_transformers_5_writes_it(config, expected):
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]} | (config["rope_scaling"] or {})
    new = without("num_experts", "rope_theta", "rope_scaling", "torch_dtype", config=config)
    new |= {"rope_parameters": rope, "dtype": "bfloat16", "pad_token_id": None}
    if "num_experts" in config:
        new["num_local_experts"] = config["num_experts"]
    if "partial_rotary_factor" in config:
        rope["partial_rotary_factor"] = new.pop("partial_rotary_factor")
    if config["model_type"] == "qwen3":
        new["layer_types"] = ["full_attention"] * 36
    assert megatron_arguments(new) == expected


@each_model
def test_through_the_installed_transformers(tmp_path, config, expected):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert megatron_arguments(read_hf_config(tmp_path / "saved")) == expected


def test_what_may_be_left_out():
    assert megatron_arguments(without("head_dim"))["kv_channels"] == 64
    assert megatron_arguments(QWEN3_30B_A3B | {"head_dim": None})["kv_channels"] == 64
    old_llama = without("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", config=LLAMA_1B)
    found = megatron_arguments(without("tie_word_embeddings", config=old_llama))
    assert (found["num_query_groups"], found["kv_channels"], found["rotary_base"]) == (32, 64, 10000)
    assert found["untie_embeddings_and_output_weights"] and not found["use_rope_scaling"]


def test_sizes_of_a_window_that_is_switched_off():
    assert megatron_arguments(QWEN3_8B | {"sliding_window": 4096, "max_window_layers": 28}) == EXPECTED_8B


@pytest.mark.parametrize("value", [None, False, 0, 0.0, [], {}, ""])
def test_an_unknown_field_that_switches_nothing_on(value):
    assert megatron_arguments(LLAMA_1B | {"some_new_feature": value}) == EXPECTED_1B


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_attn_implementation_autoset", True), ("_attn_implementation", "flash_attention_2"),
        ("_flash_attn_2_enabled", True), ("output_hidden_states", True), ("num_labels", 1),
        ("problem_type", "regression"), ("is_decoder", True), ("tokenizer_class", "LlamaTokenizer"),
        ("repetition_penalty", 1.1), ("max_sequence_length", 2048), ("is_llama_config", True),
        ("transformers.js_config", {"kv_cache_dtype": {"fp16": "float16"}}), ("neftune_noise_alpha", 5),
        ("_commit_hash", "0123"),
        ("_model_name_or_path", "of a GGUF file"),
    ],
)  # fmt: skip
@each_model
def test_fields_that_are_no_part_of_the_mathematics(field, value, config, expected):
    assert megatron_arguments(config | {field: value}) == expected


def rope(**change) -> dict:
    return {"rope_scaling": LLAMA3_ROPE | change}


@pytest.mark.parametrize(
    ("config", "change"),
    [
        *((GLM_4_5, {field: value}) for field, value in (
            ("n_group", 8), ("topk_group", 4), ("norm_topk_prob", False), ("first_k_dense_replace", -1),
            ("first_k_dense_replace", 92), ("n_shared_experts", 0),
            ("routed_scaling_factor", 0), ("routed_scaling_factor", True), ("partial_rotary_factor", 1.5),
            ("attention_bias", "no"), ("use_qk_norm", 1), ("num_nextn_predict_layers", -1),
            ("scoring_func", "softmax"),
        )),
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}),
        (QWEN3_30B_A3B, {"norm_topk_prob": False}),
        (QWEN3_8B, {"use_sliding_window": True}),
        (QWEN3_8B, {"layer_types": ["sliding_attention"]}),
        (LLAMA_1B, {"mlp_bias": True}),
        (LLAMA_1B, {"pretraining_tp": 2}),
        (LLAMA_1B, {"attention_bias": True}),
        (LLAMA_1B, {"attention_bias": "false"}),
        (LLAMA_1B, {"attention_dropout": 0.1}),
        (LLAMA_1B, {"partial_rotary_factor": 0.5}),
        (LLAMA_1B, {"hidden_act": "gelu"}),
        (LLAMA_1B, {"model_type": "mistral"}),
        # fields that are not known
        (LLAMA_1B, {"attn_logit_softcapping": 50.0}),
        (LLAMA_1B, {"sliding_window": 4096}),
        (LLAMA_1B, {"norm_topk_prob": True}),
        (QWEN3_8B, {"num_experts": 8}),
        (QWEN3_8B, {"embedding_multiplier": 1.0}),
        (QWEN3_30B_A3B, {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
        # wrong numbers
        *((QWEN3_30B_A3B, {field: value}) for field, value in (
            ("hidden_size", "64"), ("hidden_size", None), ("num_hidden_layers", -1), ("vocab_size", True),
            ("intermediate_size", 6144.0), ("head_dim", 0), ("head_dim", 127), ("rms_norm_eps", None),
            ("rms_norm_eps", 0), ("tie_word_embeddings", "no"), ("tie_word_embeddings", None),
        )),
        *((LLAMA_1B, {"rope_theta": value}) for value in (10000.5, "1e6", math.inf)),
        (LLAMA_1B, {"rope_scaling": "linear"}),
    ],
)  # fmt: skip
def test_a_field_that_is_refused_is_named_with_its_value(config, change):
    [(field, value)] = change.items()
    told = message_of(config | change)
    assert told.startswith(f"{field} is {value!r}")
    assert any(word in told for word in ("supported is", "must be", "a LlamaForCausalLM has", "may change"))


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (QWEN3_8B, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config bfloat16"),
        (LLAMA_1B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' 'default'"),
        (LLAMA_1B, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (LLAMA_1B, {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "rope 'dynamic'"),
        (LLAMA_1B, rope(low_freq_factor=2.0), "low_freq_factor 2.0 1.0"),
        (LLAMA_1B, rope(high_freq_factor=8.0), "high_freq_factor 8.0 4.0"),
        (LLAMA_1B, rope(original_max_position_embeddings=4096), "original_max_position_embeddings 4096 8192"),
        (LLAMA_1B, {"rope_scaling": without("low_freq_factor", config=LLAMA3_ROPE)}, "low_freq_factor None"),
        (LLAMA_1B, {"rope_scaling": without("factor", config=LLAMA3_ROPE)}, "factor None positive"),
        (LLAMA_1B, rope(factor=-1), "factor -1 positive"),
        (LLAMA_1B, rope(attention_factor=0.5), "attention_factor 0.5"),
        (LLAMA_1B, rope(partial_rotary_factor=0.5), "rope_parameters partial_rotary_factor 1.0"),
        (LLAMA_1B, {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta 500000.0 rope_parameters 1000000.0"),
        (QWEN3_30B_A3B, {"num_attention_heads": 30, "head_dim": None}, "num_key_value_heads 4 num_attention"),
        (QWEN3_30B_A3B, {"hidden_size": 2040, "head_dim": None}, "num_attention_heads 32 hidden_size 2040"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok 129 num_experts 128"),
        (QWEN3_30B_A3B, {"num_local_experts": 64}, "num_experts 128 num_local_experts 64"),
        (QWEN3_30B_A3B, {"norm_topk_prob": None}, "norm_topk_prob missing"),
        (GLM_4_5, {"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 head_dim 128 even"),
        (GLM_4_5, {"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor 0.5 1.0"),
    ],
)
def test_fields_that_contradict_others(config, change, words):
    told = message_of(config | change)
    assert [word for word in words.split() if word not in told] == [], told


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (QWEN3_30B_A3B, "num_hidden_layers"),
        (QWEN3_30B_A3B, "num_experts"),
        (QWEN3_30B_A3B, "num_key_value_heads"),
        (QWEN3_30B_A3B, "norm_topk_prob"),  # without it transformers does not normalise
        (QWEN3_8B, "head_dim"),
        (LLAMA_1B, "vocab_size"),
        (GLM_4_5, "attention_bias"),
        (GLM_4_5, "first_k_dense_replace"),
        (GLM_4_5, "n_routed_experts"),
    ],
)
def test_a_missing_number_is_named(config, missing):
    assert message_of(without(missing, config=config)) == f"{missing} is missing"


@each_model
def test_reads_the_folder(tmp_path, config, expected):
    with pytest.raises(ValueError, match=f"^{tmp_path}: no config.json there; it must be an HF"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"architectures": [', " is not JSON: "),
        ("[1]", ": a JSON object was expected, not a list"),
        ("{}", ": its architecture is none; supported: Qwen3MoeForCausalLM, "),
        (json.dumps(LLAMA_1B | {"mlp_bias": True}), ": mlp_bias is True, supported is False"),
    ],
)
def test_a_refusal_names_the_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_hf_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json{message}")
