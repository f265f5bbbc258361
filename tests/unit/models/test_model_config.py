"""HF config.json -> Megatron arguments."""

import json
import math

import pytest

from megatron_vespo.models.hf_config import megatron_arguments, read_hf_config
from tests.support.published_config import QWEN3_30B_A3B

ALL = {
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
}
EXPECTED = ALL | {
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "kv_channels": 128,
    "num_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 1000000,
    "use_rope_scaling": False,
    "rope_scaling_factor": 1.0,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "untie_embeddings_and_output_weights": True,
    "qk_layernorm": True,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
}
# Qwen/Qwen3-8B
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
EXPECTED_8B = ALL | {
    "num_layers": 36,
    "hidden_size": 4096,
    "ffn_hidden_size": 12288,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "num_experts": None,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 1000000,
    "use_rope_scaling": False,
    "rope_scaling_factor": 1.0,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "untie_embeddings_and_output_weights": True,
    "qk_layernorm": True,
}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# meta-llama/Llama-3.2-1B
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 128256,
}
EXPECTED_1B = ALL | {
    "num_layers": 16,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 64,
    "num_experts": None,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 500000,
    "use_rope_scaling": True,
    "rope_scaling_factor": 32.0,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "untie_embeddings_and_output_weights": False,
    "qk_layernorm": False,
}
MODELS = {
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
        ("_attn_implementation_autoset", True),
        ("_attn_implementation", "flash_attention_2"),
        ("_flash_attn_2_enabled", True),
        ("output_hidden_states", True),
        ("num_labels", 1),
        ("problem_type", "regression"),
        ("is_decoder", True),
        ("tokenizer_class", "LlamaTokenizer"),
        ("repetition_penalty", 1.1),
        ("max_sequence_length", 2048),
        ("is_llama_config", True),
        ("transformers.js_config", {"kv_cache_dtype": {"fp16": "float16"}}),
        ("neftune_noise_alpha", 5),
        ("_commit_hash", "0123"),
    ],
)
@each_model
def test_fields_that_are_no_part_of_the_mathematics(field, value, config, expected):
    assert megatron_arguments(config | {field: value}) == expected


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}, "mlp_only_layers is [0], supported is []"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, supported is 1"),
        (QWEN3_30B_A3B, {"norm_topk_prob": False}, "norm_topk_prob is False, supported is True"),
        (QWEN3_8B, {"use_sliding_window": True}, "use_sliding_window is True, supported is False"),
        (LLAMA_1B, {"mlp_bias": True}, "mlp_bias is True, supported is False"),
        (LLAMA_1B, {"pretraining_tp": 2}, "pretraining_tp is 2, supported is 1"),
        (LLAMA_1B, {"attention_bias": True}, "attention_bias is True, supported is False"),
        (LLAMA_1B, {"attention_bias": "false"}, "attention_bias is 'false', supported is False"),
        (LLAMA_1B, {"attention_dropout": 0.1}, "attention_dropout is 0.1, supported is 0.0"),
        (LLAMA_1B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, supported is 1.0"),
        (LLAMA_1B, {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        (LLAMA_1B, {"model_type": "mistral"}, "model_type is 'mistral', a LlamaForCausalLM has 'llama'"),
        (
            QWEN3_8B,
            {"layer_types": ["sliding_attention"]},
            "layer_types is ['sliding_attention'], supported is full_attention in all layers",
        ),
        (
            QWEN3_8B,
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is there: it is a quantised checkpoint; take the one in bfloat16 or float32",
        ),
        *(
            (
                config,
                {field: value},
                f"{field} is {value!r}: that field may change the mathematics and is not supported; if it "
                "does not, remove it from config.json",
            )
            for config, field, value in (
                (LLAMA_1B, "attn_logit_softcapping", 50.0),
                (LLAMA_1B, "sliding_window", 4096),
                (LLAMA_1B, "norm_topk_prob", True),
                (QWEN3_8B, "num_experts", 8),
                (QWEN3_8B, "embedding_multiplier", 1.0),
                (QWEN3_30B_A3B, "auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
            )
        ),
    ],
)
def test_other_mathematics_is_refused(config, change, message):
    assert message_of(config | change) == message


def rope(**change) -> dict:
    return {"rope_scaling": LLAMA3 | change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope type is 'yarn', supported are 'default' and",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type is 'linear', supported are"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "rope type is 'dynamic'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', must be an object or null"),
        (rope(low_freq_factor=2.0), "rope scaling's low_freq_factor is 2.0, supported is 1.0"),
        (rope(high_freq_factor=8.0), "rope scaling's high_freq_factor is 8.0, supported is 4.0"),
        (
            rope(original_max_position_embeddings=4096),
            "rope scaling's original_max_position_embeddings is 4096, supported is 8192",
        ),
        (
            {"rope_scaling": without("low_freq_factor", config=LLAMA3)},
            "rope scaling's low_freq_factor is None",
        ),
        (
            {"rope_scaling": without("factor", config=LLAMA3)},
            "rope scaling's factor is None, must be a positive",
        ),
        (rope(factor=-1), "rope scaling's factor is -1, must be a positive number"),
        (rope(attention_factor=0.5), "attention_factor is 0.5: that field may change the mathematics"),
        (rope(partial_rotary_factor=0.5), "rope_parameters has a partial_rotary_factor, supported is 1.0"),
        ({"rope_theta": 10000.5}, "rope_theta is 10000.5, must be a positive whole number"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6', must be a positive whole number"),
        ({"rope_theta": math.inf}, "rope_theta is inf, must be a positive whole number"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is 500000.0, but in rope_parameters 1000000.0",
        ),
    ],
)
def test_other_rotary_embeddings_are_refused(change, message):
    assert message_of(LLAMA_1B | change).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64', must be a positive integer"),
        ({"hidden_size": None}, "hidden_size is None, must be a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, must be a positive integer"),
        ({"vocab_size": True}, "vocab_size is True, must be a positive integer"),
        ({"intermediate_size": 6144.0}, "intermediate_size is 6144.0, must be a positive integer"),
        ({"head_dim": 0}, "head_dim is 0, must be a positive integer"),
        ({"head_dim": 127}, "head_dim is 127, must be even"),
        (
            {"num_attention_heads": 30, "head_dim": None},
            "num_key_value_heads 4 does not divide num_attention",
        ),
        ({"hidden_size": 2040, "head_dim": None}, "num_attention_heads 32 does not divide hidden_size 2040"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than num_experts 128"),
        ({"num_local_experts": 64}, "num_experts is 128, but num_local_experts is 64"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, must be a number between 0 and 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, must be a number between 0 and 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', must be true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None, must be true or false"),
        ({"norm_topk_prob": None}, "norm_topk_prob is missing"),
    ],
)
def test_wrong_numbers_are_refused(change, message):
    assert message_of(QWEN3_30B_A3B | change).startswith(message)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (QWEN3_30B_A3B, "num_hidden_layers"),
        (QWEN3_30B_A3B, "num_experts"),
        (QWEN3_30B_A3B, "num_key_value_heads"),
        # without it transformers does not normalise
        (QWEN3_30B_A3B, "norm_topk_prob"),
        (QWEN3_8B, "head_dim"),
        (LLAMA_1B, "vocab_size"),
    ],
)
def test_a_missing_number_is_named(config, missing):
    assert message_of(without(missing, config=config)) == f"{missing} is missing"


@each_model
def test_reads_the_folder(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path) == config


def test_no_config(tmp_path):
    with pytest.raises(ValueError) as error:
        read_hf_config(tmp_path)
    assert str(error.value) == f"{tmp_path}: no config.json there; it must be an HF checkpoint folder"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"architectures": [', " is not JSON: "),
        ("[1]", ": a JSON object was expected, not a list"),
        (
            "{}",
            ": its architecture is none; supported: Qwen3MoeForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM",
        ),
        (json.dumps(LLAMA_1B | {"mlp_bias": True}), ": mlp_bias is True, supported is False"),
    ],
)
def test_a_refusal_names_the_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_hf_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json{message}")
