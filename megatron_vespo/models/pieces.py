"""Table rows that several families share; table.Parameter explains a row."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_vespo.models import table
from megatron_vespo.models.mappings import QKV, Direct, GatedMLP, Vocabulary
from megatron_vespo.models.table import EMBEDDING, OUTPUT_LAYER, ModelShape, Parameter

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _direct(names: Any, shape: ModelShape, dim: int | None) -> Direct:
    return Direct(names, dim)


def _gated(names: Any, shape: ModelShape) -> GatedMLP:
    return GatedMLP(names)


def _qkv(names: Any, shape: ModelShape) -> QKV:
    return QKV(
        names,
        num_query_groups=shape.num_query_groups,
        heads_per_group=shape.num_attention_heads // shape.num_query_groups,
        head_dim=shape.head_dim,
    )


def _vocabulary(names: Any, shape: ModelShape) -> Vocabulary:
    return Vocabulary(names, 0, vocab_size=shape.vocab_size, padded_vocab_size=shape.padded_vocab_size)


_replicated = partial(_direct, dim=None)
_by_columns = partial(_direct, dim=1)


def _norm(hf_name: str, *names: str, width: str = "hidden_size") -> Parameter:
    return Parameter(names, {hf_name: (width,)}, _replicated)


WORD_EMBEDDINGS = Parameter(
    (EMBEDDING,), {"model.embed_tokens.weight": ("vocab_size", "hidden_size")}, _vocabulary
)
FINAL_NORM = _norm("model.norm.weight", table.FINAL_NORM)
OUTPUT = Parameter((OUTPUT_LAYER,), {"lm_head.weight": ("vocab_size", "hidden_size")}, _vocabulary)

INPUT_NORM = _norm(
    _HF_LAYER + "input_layernorm.weight",
    _LAYER + "input_layernorm.weight",
    _LAYER + "self_attention.linear_qkv.layer_norm_weight",
)
ATTENTION = (
    Parameter(
        (_LAYER + "self_attention.linear_proj.weight",),
        {_HF_LAYER + "self_attn.o_proj.weight": ("hidden_size", "query_width")},
        _by_columns,
    ),
    Parameter(
        (_LAYER + "self_attention.linear_qkv.weight",),
        {
            _HF_LAYER + "self_attn.q_proj.weight": ("query_width", "hidden_size"),
            _HF_LAYER + "self_attn.k_proj.weight": ("key_width", "hidden_size"),
            _HF_LAYER + "self_attn.v_proj.weight": ("key_width", "hidden_size"),
        },
        _qkv,
    ),
)
QKV_BIAS = Parameter(
    (_LAYER + "self_attention.linear_qkv.bias",),
    {
        _HF_LAYER + "self_attn.q_proj.bias": ("query_width",),
        _HF_LAYER + "self_attn.k_proj.bias": ("key_width",),
        _HF_LAYER + "self_attn.v_proj.bias": ("key_width",),
    },
    _qkv,
)
QUERY_KEY_NORMS = tuple(
    _norm(
        f"{_HF_LAYER}self_attn.{x}_norm.weight",
        f"{_LAYER}self_attention.{x}_layernorm.weight",
        width="head_dim",
    )
    for x in "qk"
)
_POST_ATTENTION_NORM = _HF_LAYER + "post_attention_layernorm.weight"


def _mlp(hf_prefix: str, *fc_names: str, width: str = "ffn_hidden_size") -> tuple[Parameter, Parameter]:
    """Return both linear layers of a gated MLP; {fc} in the Megatron names is linear_fc1 or linear_fc2."""

    def names(fc: str) -> tuple[str, ...]:
        return tuple(name.replace("{fc}", fc) for name in fc_names)

    gate_up = {f"{hf_prefix}{x}_proj.weight": (width, "hidden_size") for x in ("gate", "up")}
    down = {f"{hf_prefix}down_proj.weight": ("hidden_size", width)}
    return (
        Parameter(names("linear_fc1"), gate_up, _gated),
        Parameter(names("linear_fc2"), down, _by_columns),
    )


_DENSE_NORM = _norm(
    _POST_ATTENTION_NORM,
    _LAYER + "pre_mlp_layernorm.weight",
    _LAYER + "mlp.linear_fc1.layer_norm_weight",
)
DENSE_MLP = (_DENSE_NORM, *_mlp(_HF_LAYER + "mlp.", _LAYER + "mlp.{fc}.weight"))
# of a layer without experts in a model that has some
FIRST_DENSE_MLP = (
    _DENSE_NORM,
    *_mlp(_HF_LAYER + "mlp.", _LAYER + "mlp.{fc}.weight", width="dense_ffn_hidden_size"),
)
EXPERTS_MLP = (
    _norm(_POST_ATTENTION_NORM, _LAYER + "pre_mlp_layernorm.weight"),
    Parameter(
        (_LAYER + "mlp.router.weight",),
        {_HF_LAYER + "mlp.gate.weight": ("num_experts", "hidden_size")},
        _replicated,
    ),
    *_mlp(
        _HF_LAYER + "mlp.experts.{expert}.",
        _LAYER + "mlp.experts.local_experts.{expert}.{fc}.weight",
        _LAYER + "mlp.experts.{fc}.weight{expert}",
    ),
)
SHARED_EXPERTS_MLP = _mlp(
    _HF_LAYER + "mlp.shared_experts.",
    _LAYER + "mlp.shared_experts.{fc}.weight",
    width="shared_ffn_hidden_size",
)
# added to the scores by which experts are chosen
ROUTER_BIAS = Parameter(
    (_LAYER + "mlp.router.expert_bias",),
    {_HF_LAYER + "mlp.gate.e_score_correction_bias": ("num_experts",)},
    _replicated,
    fixed=True,
)
