"""Which part of a model a rank of the trainer holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_vespo.models.table import EMBEDDING, Parameter


@dataclass(frozen=True)
class ModelPart:
    """Layers and experts are counted over the whole model.

    `tp` and `expert_tp` are (rank, size) in the groups that share dense parameters and experts.
    """

    layers: frozenset[int]
    first: bool  # has the embedding
    last: bool  # has the final norm and the output layer
    experts: range
    tp: tuple[int, int]
    expert_tp: tuple[int, int]

    def on_rank(self, rank: int, expert_parallel_size: int) -> ModelPart:
        """What rank `rank` of the same pipeline stage holds, in the order in which Megatron numbers ranks:
        tensor, context, expert and data parallel.
        """
        tp, expert_tp, each = self.tp[1], self.expert_tp[1], len(self.experts)
        first = rank // expert_tp % expert_parallel_size * each
        return replace(
            self,
            experts=range(first, first + each),
            tp=(rank % tp, tp),
            expert_tp=(rank % expert_tp, expert_tp),
        )

    def holds(self, row: Parameter, layer: int, expert: int) -> bool:
        if not row.in_layer:
            return self.first if EMBEDDING in row.names else self.last
        return layer in self.layers and (not row.in_expert or expert in self.experts)

    def group_of(self, row: Parameter) -> tuple[int, int]:
        return self.expert_tp if row.in_expert else self.tp
