"""The recipes of examples/ and the configs of their models."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMON = {"torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
CONFIGS = {
    "qwen3_30b_a3b": COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    "qwen3_8b": COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    "llama3_2_3b": COMMON
    | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
}  # fmt: skip
# folder/recipe -> GPUs of its nodes
RECIPES = {
    "qwen3_30b_a3b/synchronous_n8": 32,
    "qwen3_30b_a3b/synchronous_n16": 32,
    "qwen3_30b_a3b/synchronous_n32": 32,
    "qwen3_30b_a3b/synchronous_n64": 32,
    "qwen3_30b_a3b/asynchronous": 64,
    "qwen3_30b_a3b/one_node_80gb": 8,
    "qwen3_30b_a3b/colocated_n8": 32,
    "qwen3_8b/synchronous_n8": 16,
    "qwen3_8b/one_node": 8,
    "qwen3_8b/colocated_one_node": 8,
    "llama3_2_3b/synchronous_n8": 8,
}
