"""HF config.json -> Megatron arguments."""

import json

import pytest

from megatron_vespo.conversion.config import megatron_arguments, read_hf_config

# Qwen/Qwen3-30B-A3B as transformers 4 wrote it
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
EXPECTED = {
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 128,
    "num_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 1000000,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
}


def without(*keys: str) -> dict:
    return {key: value for key, value in QWEN3_30B_A3B.items() if key not in keys}


def test_as_transformers_4_wrote_it():
    assert megatron_arguments(QWEN3_30B_A3B) == EXPECTED


def test_as_transformers_5_writes_it():
    config = without("num_experts", "rope_theta", "rope_scaling", "torch_dtype") | {
        "num_local_experts": 128,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "dtype": "bfloat16",
    }
    assert megatron_arguments(config) == EXPECTED


def test_through_the_installed_transformers(tmp_path):
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(**QWEN3_30B_A3B).save_pretrained(tmp_path)
    assert megatron_arguments(read_hf_config(tmp_path)) == EXPECTED


def test_head_dim_left_out():
    assert megatron_arguments(without("head_dim"))["kv_channels"] == 64
    assert megatron_arguments(QWEN3_30B_A3B | {"head_dim": None})["kv_channels"] == 64


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tied embeddings"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers (dense layers between MoE layers)"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step other than 1"),
        ({"norm_topk_prob": False}, "norm_topk_prob false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_other_mathematics_is_refused(change, what):
    with pytest.raises(ValueError) as error:
        megatron_arguments(QWEN3_30B_A3B | change)
    assert str(error.value) == f"--hf-checkpoint: config.json asks for {what}, which is not supported"


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("num_hidden_layers", "num_hidden_layers"),
        ("num_experts", "num_local_experts"),
        ("vocab_size", "vocab_size"),
    ],
)
def test_a_missing_number_is_named(missing, named):
    with pytest.raises(ValueError, match=f"^--hf-checkpoint: config.json has no {named}$"):
        megatron_arguments(without(missing))


def test_a_default_of_the_config_class_is_applied():
    """Without norm_topk_prob transformers does not normalise."""
    with pytest.raises(ValueError, match="norm_topk_prob false"):
        megatron_arguments(without("norm_topk_prob"))


def test_reads_the_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    assert read_hf_config(tmp_path) == QWEN3_30B_A3B


def test_no_config(tmp_path):
    with pytest.raises(ValueError) as error:
        read_hf_config(tmp_path)
    assert str(error.value) == (
        f"--hf-checkpoint {tmp_path}: no config.json there; it must be an HF checkpoint folder"
    )


def test_broken_json(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(
        ValueError, match=rf"^--hf-checkpoint: {tmp_path}/config.json is not JSON: .*line 1 column"
    ):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": []}, "none"),
        ({"architectures": None}, "none"),
        ({}, "none"),
    ],
)
def test_another_architecture(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        read_hf_config(tmp_path)
    assert str(error.value) == f"--hf-checkpoint {tmp_path} is a {found}; supported: Qwen3MoeForCausalLM"
