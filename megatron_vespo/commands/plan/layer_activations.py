"""Counts what a transformer layer keeps for its backward pass, tensor by tensor.

The count is that of Korthikanti et al. (arXiv 2205.05198, section 4), adapted to what runs here: grouped
queries, query and key norms, SwiGLU, experts, no dropout and an attention kernel that keeps no scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vespo.arguments.trainer import TrainerSettings


@dataclass(frozen=True)
class Kept:
    """Bytes that a rank keeps of one layer per token of its micro-batch."""

    name: str
    bytes: float
    modules: frozenset[str] = frozenset()  # names for --recompute-modules that free it


def kept_by_layer(settings: TrainerSettings) -> list[Kept]:
    """All kept tensors of one layer, without recomputation.

    Tokens are those of a context-parallel rank. With sequence parallelism a tensor-parallel rank has a slice
    of them outside attention and experts. Experts are assumed to get equal shares of the tokens; with uneven
    routing the busiest rank keeps more. Except before experts, Transformer Engine makes a norm part of the
    linear layer behind it: it is recomputed with that layer or not at all.
    """
    dense = settings.num_experts is None
    tensor, size = settings.tensor_model_parallel_size, settings.params_dtype.itemsize
    hidden, slices = settings.hidden_size, tensor if settings.sequence_parallel else 1
    query, key = (
        heads * settings.kv_channels / tensor
        for heads in (settings.num_attention_heads, settings.num_query_groups)
    )
    fused, norm = settings.transformer_impl == "transformer_engine", frozenset({"layernorm"})
    kept = [
        Kept("input of the first norm", size * hidden / slices),
        Kept("its output", size * hidden / slices, frozenset() if fused else norm),
        Kept("queries, keys, values", size * (query + 2 * key)),
        Kept("attention output", size * query),
        Kept("log-sum-exp of the attention", 4 * settings.num_attention_heads / tensor),
        Kept("input of the second norm", size * hidden / slices),
        Kept("its output", size * hidden / slices, frozenset({"mlp"}) if fused and dense else norm),
    ]
    if settings.qk_layernorm:
        kept.append(Kept("queries and keys before their norms", size * (query + key)))
    return kept + (_dense(settings) if dense else _experts(settings, slices))


def _dense(settings: TrainerSettings) -> list[Kept]:
    width = settings.ffn_hidden_size / settings.tensor_model_parallel_size
    size, modules = settings.params_dtype.itemsize, frozenset({"mlp"})
    return [Kept("gate and up", size * 2 * width, modules), Kept("their product", size * width, modules)]


def _experts(settings: TrainerSettings, slices: int) -> list[Kept]:
    """Each of a rank's tokens goes to top-k experts, and to the shared ones.

    Expert tensor parallelism gathers tokens and cuts widths. First layers without experts are taken for such
    layers: of the published models they keep about as much.
    """
    assert settings.num_experts is not None
    chosen = settings.moe_router_topk / slices
    expert_tensor = settings.expert_tensor_parallel_size or settings.tensor_model_parallel_size
    size, modules = settings.params_dtype.itemsize, frozenset({"moe"})
    shared = (settings.moe_shared_expert_intermediate_size or 0) / settings.tensor_model_parallel_size
    of_shared = (
        [Kept("shared experts' gate, up and their product", size * 3 * shared, modules)] if shared else []
    )
    return [
        *of_shared,
        Kept("router's logits and probabilities", 2 * 4 * settings.num_experts / slices, modules),
        Kept("tokens at the experts", size * chosen * expert_tensor * settings.hidden_size, modules),
        Kept("gate and up", size * chosen * 2 * settings.moe_ffn_hidden_size, modules),
        Kept("their product", size * chosen * settings.moe_ffn_hidden_size, modules | {"moe_act"}),
    ]
