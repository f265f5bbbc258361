"""Filling a rollout batch with groups that teach something (dynamic sampling, DAPO, arXiv 2503.14476).

Groups whose completions all earn the same are left out and further prompts are generated in their place. The
task's reward decides, as in the paper, not a penalty for length: else groups of wrong answers would stay
because some are longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_vespo.algorithms.advantages import has_variance
from megatron_vespo.types import Completion

Group = list[Completion]


def has_reward_variance(group: Group) -> bool:
    """Whether its rewards differ."""
    return bool(has_variance(np.array([[completion.reward for completion in group]]))[0])


@dataclass
class RolloutBatch:
    """Collects scored groups until `size` of them have variance or `max_prompts` prompts were generated.

    Nothing is carried over to the next batch, so the prompts consumed are the whole state of a resumed run.
    With `max_prompts` = `size` one round takes everything as it comes: no dynamic sampling.
    """

    size: int
    max_prompts: int
    generated: list[Group] = field(default_factory=list)  # in the order of their prompts
    varied: list[bool] = field(default_factory=list)  # of each, whether its rewards differ

    def num_wanted(self) -> int:
        """Prompts of the next round, 0 when there is none.

        As many as fill the batch if the share with variance stays what it was, at most a whole batch. That is
        fewer rounds than with only the missing ones, each of which waits for its longest response, and less
        is thrown away than with whole batches.
        """
        kept, done = sum(self.varied), len(self.generated)
        missing = max(self.size - kept, 0)
        expected = -(-missing * done // kept) if kept else self.size
        return min(expected, self.size, self.max_prompts - done)

    def add(self, groups: list[Group]) -> None:
        self.generated += groups
        self.varied += [has_reward_variance(group) for group in groups]

    def groups(self) -> list[Group]:
        """`size` groups as they were generated: the first ones with variance, then, if too few, others."""
        order = sorted(range(len(self.generated)), key=lambda i: not self.varied[i])
        return [self.generated[i] for i in sorted(order[: self.size])]

    @property
    def shortfall(self) -> int:
        """Groups without variance that fill the batch because the cap was reached."""
        return max(self.size - sum(self.varied), 0)

    def metrics(self) -> dict[str, float]:
        kept, generated = sum(self.varied), len(self.generated)
        return {
            "rollout/generated_prompts": float(generated),
            # without variance, and left out
            "rollout/filtered_groups": float(generated - kept - self.shortfall),
            # with variance, and more than fit
            "rollout/surplus_groups": float(max(kept - self.size, 0)),
            "rollout/shortfall_groups": float(self.shortfall),
        }
