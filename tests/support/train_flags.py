"""Flags of a small training run and the model's config that they name."""

from __future__ import annotations

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 97,
}
BASE = (
    "--prompt-data train.jsonl --output-dir out --train-iters 8 --lr 1e-4 --steps-per-rollout 4 "
    "--rollout-batch-size 16 --group-size 4 --max-prompt-tokens 20 --max-completion-tokens 30"
).split()
