"""Qwen3MoeForCausalLM: Qwen3-30B-A3B, Qwen3-235B-A22B."""

from megatron_vespo.models import pieces, qwen3
from megatron_vespo.models.table import Family

FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    table=(
        pieces.WORD_EMBEDDINGS,
        pieces.INPUT_NORM,
        *pieces.ATTENTION,
        *pieces.QUERY_KEY_NORMS,
        *pieces.EXPERTS_MLP,
        pieces.FINAL_NORM,
        pieces.OUTPUT,
    ),
    sizes={
        "num_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
    },
    constants={
        "qk_layernorm": True,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
    },
    neutral={
        **qwen3.FAMILY.neutral,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    required={"norm_topk_prob", "num_key_value_heads"},
    harmless=qwen3.FAMILY.harmless | {"router_aux_loss_coef", "output_router_logits"},
)
