"""Parameters of one pipeline stage, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What a rank of a pipeline stage holds; all ranks of the stage hold as much.

    Numbers of parameters; `whole` is what all ranks of the stage hold together, every parameter once.
    """

    layers: int
    dense: int  # sharded over the data- and context-parallel ranks by the distributed optimizer
    experts: int  # sharded over the expert-data-parallel ranks
    whole: int
    dense_shards: int  # ranks in those groups
    expert_shards: int

    @property
    def parameters(self) -> int:
        return self.dense + self.experts
