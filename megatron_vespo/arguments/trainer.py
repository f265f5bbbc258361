"""Megatron's arguments that are needed outside the trainer: layout, model, precision, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_vespo.system.settings import Settings


@dataclass(frozen=True)
class TrainerSettings(Settings):
    """Names and values are Megatron's, completed and checked by Megatron's own parser."""

    # layout: numbers of ranks
    trainer_ranks: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int | None
    data_parallel_size: int
    sequence_parallel: bool
    microbatch_group_size_per_vp_stage: int | None
    # the model
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int
    num_attention_heads: int
    num_query_groups: int
    qk_layernorm: bool
    num_experts: int | None  # None: a dense model
    moe_router_topk: int
    moe_ffn_hidden_size: int | None
    moe_shared_expert_intermediate_size: int | None  # of all shared experts together
    vocab_size: int
    padded_vocab_size: int
    # precision and kernels
    bf16: bool
    params_dtype: Any  # torch.dtype
    distributed_backend: str
    transformer_impl: str
    # sizes, in completions or tokens
    global_batch_size: int
    seq_length: int
    max_tokens_per_gpu: int
    log_prob_chunk_size: int
    # memory
    recompute_granularity: str | None
    recompute_method: str | None
    recompute_num_layers: int | None
    recompute_modules: tuple[str, ...] | None
    distribute_saved_activations: bool
    use_distributed_optimizer: bool
    accumulate_allreduce_grads_in_fp32: bool
    optimizer_cpu_offload: bool
    optimizer_offload_fraction: float
    use_precision_aware_optimizer: bool
    exp_avg_dtype: Any  # torch.dtype
    exp_avg_sq_dtype: Any  # torch.dtype
    async_save: bool
