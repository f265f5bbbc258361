"""Defines a model family: a table of its parameters, for both directions, and the rules of its config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from megatron_vespo.models import mappings

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide which parameters a model has and how large they are."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of one expert, or of every MLP in a model without experts
    num_experts: int  # 0 in a dense model
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    tied_embeddings: bool  # the output layer shares the embedding's weight
    # a model with experts may begin with layers that have none
    dense_layers: int = 0
    dense_ffn_hidden_size: int = 0  # of such a layer
    shared_ffn_hidden_size: int = 0  # of all shared experts together
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_query_groups * self.head_dim


def everywhere(shape: ModelShape, layer: int) -> bool:
    """Every layer has the parameter."""
    return True


@dataclass(frozen=True)
class Parameter:
    """One kind of Megatron parameter and the HF tensors that it consists of.

    `names`: its Megatron names; the local layer spec's first, then Transformer Engine's if that differs.
    `tensors`: HF name -> shape; the dimensions are names of ModelShape attributes.
    `build`: HF names and shape -> mapping.
    {layer} and {expert} in names are global numbers, counted over the whole model.
    `exists`: shape and layer -> whether the layer has it.
    `fixed`: a buffer that nothing trains. It stays float32 in a bfloat16 model.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    build: Callable[[tuple[str, ...], ModelShape], mappings.Mapping]
    exists: Callable[[ModelShape, int], bool] = everywhere
    fixed: bool = False

    @cached_property
    def patterns(self) -> tuple[re.Pattern, ...]:
        return tuple(
            re.compile(
                re.escape(name)
                .replace(r"\{layer\}", r"(?P<layer>\d+)")
                .replace(r"\{expert\}", r"(?P<expert>\d+)")
            )
            for name in self.names
        )

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.names[0]

    @property
    def in_expert(self) -> bool:
        return "{expert}" in self.names[0]


def _no_more(config: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One HF architecture.

    `table` has the parameters in the model's order. The other fields are rules for config.json, in addition
    to the rules for all families:

    `sizes`: HF field -> Megatron argument, for positive integers.
    `constants`: Megatron arguments that all models of the family share.
    `arguments`: config -> more Megatron arguments; ValueError for a config that they cannot express.
    `reads`: fields that `arguments` reads. Rules of all families for them do not apply.
    `neutral`: HF field -> the only value that Megatron supports.
    `required`: fields that must be present, because the defaults of transformers differ.
    `harmless`: fields that do not change what the model computes.
    """

    architecture: str
    model_type: str
    table: tuple[Parameter, ...]
    sizes: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = _no_more
    reads: AbstractSet[str] = frozenset()
    neutral: Mapping[str, Any] = field(default_factory=dict)
    required: AbstractSet[str] = frozenset()
    harmless: AbstractSet[str] = frozenset()

    def parameters(self, shape: ModelShape) -> Iterator[str]:
        """Yield the whole model's Megatron parameters in its order, by their names in the local layer spec.

        Layer and expert numbers are global. A tied output layer is left out.
        """
        for row, numbers in self.rows(shape):
            yield row.names[0].format(**numbers)

    def hf_tensors(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every HF tensor of the whole model."""
        return {
            name.format(**numbers): tuple(getattr(shape, dimension) for dimension in dimensions)
            for row, numbers in self.rows(shape)
            for name, dimensions in row.tensors.items()
        }

    def fixed_tensors(self, shape: ModelShape) -> set[str]:
        """Return the names of the HF tensors that nothing trains and that keep their own dtype."""
        return {
            name.format(**numbers) for row, numbers in self.rows(shape) if row.fixed for name in row.tensors
        }

    def mapping_for(self, megatron_name: str, shape: ModelShape) -> mappings.Mapping:
        """Return the mapping of a Megatron parameter under any of its names; KeyError if there is none."""
        if shape.tied_embeddings and megatron_name == OUTPUT_LAYER:
            megatron_name = EMBEDDING  # a copy of the embedding on the last pipeline stage
        for row in self.table:
            for pattern in row.patterns:
                match = pattern.fullmatch(megatron_name)
                if match:
                    names = tuple(name.format(**match.groupdict()) for name in row.tensors)
                    return row.build(names, shape)
        raise KeyError(f"{self.architecture} has no parameter {megatron_name}")

    def rows(self, shape: ModelShape) -> Iterator[tuple[Parameter, dict[str, int]]]:
        """Yield rows with their layer and expert numbers, in the model's order: by layer, then by expert."""
        for in_layer, rows in groupby(self.table, lambda row: row.in_layer):
            kept = [row for row in rows if not (shape.tied_embeddings and OUTPUT_LAYER in row.names)]
            for layer in range(shape.num_layers if in_layer else 1):
                there = [row for row in kept if row.exists(shape, layer)]
                for in_expert, part in groupby(there, lambda row: row.in_expert):
                    together = list(part)
                    for expert in range(shape.num_experts if in_expert else 1):
                        yield from ((row, {"layer": layer, "expert": expert}) for row in together)


def is_expert(megatron_name: str) -> bool:
    """Return whether the parameter is sharded over the expert groups, not the dense groups."""
    return ".mlp.experts." in megatron_name
