"""Where SGLang keeps each HF tensor: its parameters' names, and which rows and columns a rank has.

Read in SGLang 0.5.23: `models/qwen3.py`, `qwen3_moe.py`, `glm4_moe.py` and `llama.py`, `layers/linear.py`,
`layers/vocab_parallel_embedding.py`, `layers/moe/fused_moe_triton/layer.py`. Unquantized weights only: q, k
and v are fused, gate and up as well, the experts of a layer are stacked. A parameter is taken as a matrix:
one of three dimensions has the rows of all its experts, one of one dimension is a column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from megatron_vespo.checkpoints.block_fp8 import BLOCK, is_quantised
from megatron_vespo.models.table import ModelShape

VOCABULARY_MULTIPLE = 64  # SGLang pads the rows of the embedding to it, and more if ranks do not divide that


@dataclass(frozen=True)
class EngineLayout:
    """The ranks of one engine: tensor parallel, of which the experts use `ep` for whole experts."""

    tp: int
    ep: int = 1

    @property
    def expert_tp(self) -> int:
        return self.tp // self.ep


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of an HF tensor, and the row and column of the parameter where they begin."""

    row: int
    rows: int
    col: int
    cols: int
    to_row: int
    to_col: int = 0


@dataclass(frozen=True)
class Destination:
    """One HF tensor on one rank. `shape` is the parameter's, as a matrix, without the experts before.

    `padding` is the number of rows behind the tensor's that SGLang fills with zeros.
    """

    parameter: str
    rectangle: Rectangle
    shape: tuple[int, int]
    padding: int = 0


def check_supported(layout: EngineLayout, shape: ModelShape) -> None:
    """ValueError with the reason why this module does not know how SGLang divides the model."""
    if layout.tp % layout.ep:
        raise ValueError(f"expert parallelism {layout.ep} does not divide tensor parallelism {layout.tp}")
    if shape.num_experts % layout.ep:
        raise ValueError(f"{shape.num_experts} experts cannot be divided by {layout.ep}")
    if max(layout.tp, shape.num_query_groups) % min(layout.tp, shape.num_query_groups):
        raise ValueError(f"{shape.num_query_groups} key heads on {layout.tp} ranks")


def check_one_dtype(fixed: Collection[str], element_bytes: int) -> None:
    """ValueError if some HF tensors, those that nothing trains, are float32 beside smaller weights."""
    if fixed and element_bytes < torch.float32.itemsize:
        raise ValueError(f"{min(fixed)} is float32, the other weights have {element_bytes} bytes an element")


def check_blocks(hf_tensors: Mapping[str, tuple[int, ...]], layout: EngineLayout, shape: ModelShape) -> None:
    """ValueError unless ranks have whole blocks of what `block_fp8` quantises, as SGLang's kernels ask."""
    for name, hf_shape in hf_tensors.items():
        if not is_quantised(name):
            continue
        part = destination(name, hf_shape, 0, layout, shape).rectangle
        if part.rows % BLOCK or part.cols % BLOCK:
            raise ValueError(
                f"an engine rank has {part.rows} x {part.cols} of {name}, no multiple of {BLOCK} x {BLOCK}; "
                f"engines have TP {layout.tp} and EP {layout.ep}"
            )


def destination(
    hf_name: str, hf_shape: tuple[int, ...], rank: int, layout: EngineLayout, shape: ModelShape
) -> Destination:
    """Where `rank` of an engine keeps the tensor. ValueError if SGLang's place of it is not known.

    Of an expert's tensor this is its place in an engine that has only this expert: the rows of the experts
    before come on top, see `experts_of`.
    """
    rows, cols = (*hf_shape, 1)[:2]
    prefix, _, leaf = hf_name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    for pattern, place in _PLACES:
        if fnmatchcase(hf_name, pattern):
            return place(prefix, leaf, rows, cols, rank, layout, shape)
    raise ValueError(f"SGLang's layout of {hf_name} is not known")


def experts_of(rank: int, layout: EngineLayout, num_experts: int) -> range:
    """The experts that a rank has, in the order of its rows."""
    each = num_experts // layout.ep
    first = rank // layout.expert_tp * each
    return range(first, first + each)


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all ranks."""
    multiple = VOCABULARY_MULTIPLE
    if _up(vocab_size, multiple) % tp:
        multiple *= tp
    return _up(vocab_size, multiple)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _replicated(prefix, leaf, rows, cols, rank, layout, shape) -> Destination:
    return Destination(f"{prefix}.{leaf}.weight", Rectangle(0, rows, 0, cols, 0), (rows, cols))


def _vocabulary(prefix, leaf, rows, cols, rank, layout, shape) -> Destination:
    each = padded_vocabulary(rows, layout.tp) // layout.tp
    first = rank * each
    have = max(0, min(rows - first, each))
    name = f"{prefix}.{leaf}.weight" if prefix else f"{leaf}.weight"
    return Destination(name, Rectangle(first, have, 0, cols, 0), (each, cols), each - have)


def _qkv(prefix, leaf, rows, cols, rank, layout, shape: ModelShape) -> Destination:
    q = shape.query_width // layout.tp
    # ranks beyond the number of key heads share them: consecutive ranks have the same
    copies = max(1, layout.tp // shape.num_query_groups)
    kv = shape.key_width * copies // layout.tp
    starts = {"q_proj": (rank * q, q, 0), "k_proj": (rank // copies * kv, kv, q)}
    starts["v_proj"] = (rank // copies * kv, kv, q + kv)
    first, have, at = starts[leaf]
    return Destination(f"{prefix}.qkv_proj.weight", Rectangle(first, have, 0, cols, at), (q + 2 * kv, cols))


def _qkv_bias(prefix, leaf, rows, cols, rank, layout, shape: ModelShape) -> Destination:
    place = _qkv(prefix, leaf, rows, cols, rank, layout, shape)
    return replace(place, parameter=f"{prefix}.qkv_proj.bias")


def _router_bias(prefix, leaf, rows, cols, rank, layout, shape) -> Destination:
    return Destination(f"{prefix}.{leaf}", Rectangle(0, rows, 0, cols, 0), (rows, cols))


def _by_columns(prefix, leaf, rows, cols, rank, layout, shape) -> Destination:
    each = cols // layout.tp
    return Destination(f"{prefix}.{leaf}.weight", Rectangle(0, rows, rank * each, each, 0), (rows, each))


def _gate_up(prefix, leaf, rows, cols, rank, layout, shape) -> Destination:
    each = rows // layout.tp
    at = 0 if leaf == "gate_proj" else each
    return Destination(
        f"{prefix}.gate_up_proj.weight", Rectangle(rank * each, each, 0, cols, at), (2 * each, cols)
    )


def _expert_gate_up(prefix, leaf, rows, cols, rank, layout: EngineLayout, shape) -> Destination:
    each = rows // layout.expert_tp
    at = 0 if leaf == "gate_proj" else each
    first = rank % layout.expert_tp * each
    name = prefix.rpartition(".")[0] + ".w13_weight"
    return Destination(name, Rectangle(first, each, 0, cols, at), (2 * each, cols))


def _expert_down(prefix, leaf, rows, cols, rank, layout: EngineLayout, shape) -> Destination:
    each = cols // layout.expert_tp
    name = prefix.rpartition(".")[0] + ".w2_weight"
    return Destination(name, Rectangle(0, rows, rank % layout.expert_tp * each, each, 0), (rows, each))


_PLACES = (
    ("model.embed_tokens.weight", _vocabulary),
    ("lm_head.weight", _vocabulary),
    ("*.self_attn.[qkv]_proj.weight", _qkv),
    ("*.self_attn.[qkv]_proj.bias", _qkv_bias),
    ("*.self_attn.o_proj.weight", _by_columns),
    ("*.mlp.experts.*.down_proj.weight", _expert_down),
    ("*.mlp.experts.*_proj.weight", _expert_gate_up),
    ("*.mlp.gate.weight", _replicated),
    ("*.mlp.gate.e_score_correction_bias", _router_bias),
    ("*.mlp.shared_experts.down_proj.weight", _by_columns),
    ("*.mlp.down_proj.weight", _by_columns),
    ("*.mlp.*_proj.weight", _gate_up),
    ("*norm.weight", _replicated),
)
