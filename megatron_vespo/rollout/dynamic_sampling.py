"""Dynamic sampling (DAPO, arXiv 2503.14476): fills a rollout batch with groups that have reward variance.

A group whose completions all have the same reward has no gradient. It is left out, and the group of another
prompt is generated instead. As in the paper, the task's reward decides, without the length penalty. With the
penalty, groups of wrong answers would stay because some answers are longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_vespo.algorithms.advantages import has_variance
from megatron_vespo.types import Completion

Group = list[Completion]


def has_reward_variance(group: Group) -> bool:
    """Whether the rewards of its completions differ."""
    return bool(has_variance(np.array([[completion.reward for completion in group]]))[0])


@dataclass
class RolloutBatch:
    """Collects scored groups until `size` of them have variance or `max_prompts` prompts were generated.

    Nothing is carried over to the next batch, so the number of consumed prompts is the whole state to resume
    from. If `max_prompts` equals `size`, one round takes all groups: no dynamic sampling.
    """

    size: int
    max_prompts: int
    generated: list[Group] = field(default_factory=list)  # in the order of their prompts
    varied: list[bool] = field(default_factory=list)  # for each group, whether its rewards differ

    def num_wanted(self) -> int:
        """How many prompts the next round generates; 0 if the batch is full or `max_prompts` is reached.

        As many as fill the batch if the share of groups with variance stays the same; at most a whole batch.
        Generating only the missing groups would need more rounds, and every round waits for its longest
        response. Generating whole batches would waste more groups.
        """
        kept, done = sum(self.varied), len(self.generated)
        missing = max(self.size - kept, 0)
        expected = -(-missing * done // kept) if kept else self.size
        return min(expected, self.size, self.max_prompts - done)

    def add(self, groups: list[Group]) -> None:
        self.generated += groups
        self.varied += [has_reward_variance(group) for group in groups]

    def groups(self) -> list[Group]:
        """`size` groups in the order of generation: the first with variance, then, if too few, others."""
        order = sorted(range(len(self.generated)), key=lambda i: not self.varied[i])
        return [self.generated[i] for i in sorted(order[: self.size])]

    @property
    def shortfall(self) -> int:
        """How many groups without variance fill the batch, because `max_prompts` was reached."""
        return max(self.size - sum(self.varied), 0)

    def metrics(self) -> dict[str, float]:
        kept, generated = sum(self.varied), len(self.generated)
        return {
            "rollout/generated_prompts": float(generated),
            # without variance: left out
            "rollout/filtered_groups": float(generated - kept - self.shortfall),
            # with variance, but more than fit
            "rollout/surplus_groups": float(max(kept - self.size, 0)),
            "rollout/shortfall_groups": float(self.shortfall),
        }
