"""Parameter counts of one pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vespo.models.part import ModelPart


@dataclass(frozen=True)
class Stage:
    """Number of parameters that one rank of a pipeline stage holds, the same on all ranks of the stage.

    `whole` counts the parameters of the whole stage, each parameter once. `part` is what its first rank
    holds.
    """

    part: ModelPart
    dense: int  # sharded over the data- and context-parallel ranks by the distributed optimizer
    experts: int  # sharded over the expert-data-parallel ranks
    whole: int
    dense_shards: int  # ranks in those groups
    expert_shards: int

    @property
    def layers(self) -> int:
        return len(self.part.layers)

    @property
    def parameters(self) -> int:
        return self.dense + self.experts
