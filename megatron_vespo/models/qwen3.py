"""Qwen3ForCausalLM: the dense models, 0.6B to 32B; the small ones tie the output layer to the embedding."""

from megatron_vespo.models import pieces
from megatron_vespo.models.table import Family

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    table=(
        pieces.WORD_EMBEDDINGS,
        pieces.INPUT_NORM,
        *pieces.ATTENTION,
        *pieces.QUERY_KEY_NORMS,
        *pieces.DENSE_MLP,
        pieces.FINAL_NORM,
        pieces.OUTPUT,
    ),
    constants={"qk_layernorm": True},
    neutral={"use_sliding_window": False},
    required={"head_dim", "num_key_value_heads"},
    # width and first layer of the sliding window, which these models do not use
    harmless={"sliding_window", "max_window_layers"},
)
