"""Files config.json of the HF hub, as transformers 4 wrote them."""

from __future__ import annotations

from typing import Any

_COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "num_attention_heads": 32, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True,
}  # fmt: skip
_QWEN3 = _COMMON | {
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False,
    "transformers_version": "4.51.0", "vocab_size": 151936,
}  # fmt: skip
# Qwen/Qwen3-30B-A3B
QWEN3_30B_A3B: dict[str, Any] = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048,
    "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
# Qwen/Qwen3-8B
QWEN3_8B: dict[str, Any] = _QWEN3 | {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288,
    "max_window_layers": 36, "model_type": "qwen3", "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rope_theta": 1000000,
}  # fmt: skip
LLAMA3_ROPE: dict[str, Any] = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
# meta-llama/Llama-3.2-1B
LLAMA_1B: dict[str, Any] = _COMMON | {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "transformers_version": "4.45.0", "vocab_size": 128256,
}  # fmt: skip
# meta-llama/Llama-3.2-3B
LLAMA_3B = LLAMA_1B | {
    "head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28,
}  # fmt: skip
_GLM4_MOE = _COMMON | {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128, "max_position_embeddings": 131072, "model_type": "glm4_moe", "n_group": 1,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
    "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "topk_group": 1,
    "transformers_version": "4.54.0", "vocab_size": 151552,
}  # fmt: skip
# zai-org/GLM-4.5
GLM_4_5: dict[str, Any] = _GLM4_MOE | {
    "first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5, "use_qk_norm": True,
}  # fmt: skip
# zai-org/GLM-4.5-Air
GLM_4_5_AIR: dict[str, Any] = _GLM4_MOE | {
    "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_hidden_layers": 46,
    "routed_scaling_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip
