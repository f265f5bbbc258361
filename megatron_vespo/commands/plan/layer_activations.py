"""What a transformer layer keeps for its backward pass, tensor by tensor.

The count of Korthikanti et al. (arXiv 2205.05198, section 4) made anew for what runs here: grouped queries,
query and key norms, SwiGLU, experts, no dropout and an attention kernel that keeps no scores.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Bytes a rank keeps of one layer for one token of its micro-batch."""

    name: str
    bytes: float
    modules: frozenset[str] = frozenset()  # names for --recompute-modules that free it


def kept_by_layer(args: Namespace) -> list[Kept]:
    """All of one layer, nothing recomputed.

    Tokens are those of a context-parallel rank. With sequence parallelism a tensor-parallel rank has a slice
    of them outside attention and experts. Experts get equal shares of the tokens: where routing is uneven the
    busiest rank keeps more. Transformer Engine makes a norm a part of the linear layer behind it, experts
    aside: it is recomputed with that layer or not at all.
    """
    dense = args.num_experts is None
    tensor, size = args.tensor_model_parallel_size, args.params_dtype.itemsize
    hidden, slices = args.hidden_size, tensor if args.sequence_parallel else 1
    query, key = (
        heads * args.kv_channels / tensor for heads in (args.num_attention_heads, args.num_query_groups)
    )
    fused, norm = args.transformer_impl == "transformer_engine", frozenset({"layernorm"})
    kept = [
        Kept("input of the first norm", size * hidden / slices),
        Kept("its output", size * hidden / slices, frozenset() if fused else norm),
        Kept("queries, keys, values", size * (query + 2 * key)),
        Kept("attention output", size * query),
        Kept("log-sum-exp of the attention", 4 * args.num_attention_heads / tensor),
        Kept("input of the second norm", size * hidden / slices),
        Kept("its output", size * hidden / slices, frozenset({"mlp"}) if fused and dense else norm),
    ]
    if args.qk_layernorm:
        kept.append(Kept("queries and keys before their norms", size * (query + key)))
    return kept + (_dense(args) if dense else _experts(args, slices))


def _dense(args: Namespace) -> list[Kept]:
    width = args.ffn_hidden_size / args.tensor_model_parallel_size
    size, modules = args.params_dtype.itemsize, frozenset({"mlp"})
    return [Kept("gate and up", size * 2 * width, modules), Kept("their product", size * width, modules)]


def _experts(args: Namespace, slices: int) -> list[Kept]:
    """Each of a rank's tokens goes to top-k experts.

    Expert tensor parallelism gathers tokens and cuts widths.
    """
    chosen = args.moe_router_topk / slices
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    size, modules = args.params_dtype.itemsize, frozenset({"moe"})
    return [
        Kept("router's logits and probabilities", 2 * 4 * args.num_experts / slices, modules),
        Kept("tokens at the experts", size * chosen * expert_tensor * args.hidden_size, modules),
        Kept("gate and up", size * chosen * 2 * args.moe_ffn_hidden_size, modules),
        Kept("their product", size * chosen * args.moe_ffn_hidden_size, modules | {"moe_act"}),
    ]
