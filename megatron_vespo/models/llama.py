"""LlamaForCausalLM: Llama 2 and 3.x; the small 3.2 models tie the output layer to the embedding."""

from megatron_vespo.models import pieces
from megatron_vespo.models.table import Family

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    table=(
        pieces.WORD_EMBEDDINGS,
        pieces.INPUT_NORM,
        *pieces.ATTENTION,
        *pieces.DENSE_MLP,
        pieces.FINAL_NORM,
        pieces.OUTPUT,
    ),
    constants={"qk_layernorm": False},
    neutral={"mlp_bias": False, "pretraining_tp": 1},
)
