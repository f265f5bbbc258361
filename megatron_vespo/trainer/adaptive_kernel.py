"""Adapts the kernel of --vespo-budget after each optimizer step and keeps it across checkpoints."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_vespo.algorithms.losses.table import PolicyLoss
from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.algorithms.vespo_budget import adapted, window, within_bounds

STATE, ESTIMATED = "vespo_c2", "vespo_estimated"  # keys in a checkpoint's rollout state


class AdaptiveKernel:
    """The kernel of the next optimizer step. It never changes if `budget` is None.

    `stored` is the rollout state of the checkpoint that the run resumes from, empty for a fresh start. With a
    budget, c2 continues from the stored value. c1 and the budget come from this command.
    """

    def __init__(
        self, kernel: GammaKernel, budget: float | None, steps_per_rollout: int, stored: Mapping[str, Any]
    ):
        self._kernel, self._budget = kernel, budget
        self._estimated: deque[list[bool]] = deque(stored.get(ESTIMATED, ()), window(steps_per_rollout) - 1)
        c2 = stored.get(STATE)
        if c2 is not None and budget is not None:
            (c1_positive, _), (c1_negative, _) = kernel.positive, kernel.negative
            self._kernel = GammaKernel(
                (c1_positive, within_bounds(c1_positive, c2[0])),
                (c1_negative, within_bounds(c1_negative, c2[1])),
            )

    def applied_to(self, loss: PolicyLoss) -> PolicyLoss:
        """The loss with the current kernel."""
        return loss if self._budget is None else loss.with_options(kernel=self._kernel)

    def state(self) -> dict[str, list]:
        """What a checkpoint must store."""
        if self._budget is None:
            return {}
        return {STATE: self._c2, ESTIMATED: list(self._estimated)}

    def step(self, log_w: np.ndarray, sign_shares: np.ndarray) -> dict[str, np.ndarray]:
        """Adapt the kernel to the samples of the optimizer step that used it; returns fields of StepResult.

        `log_w` [num_samples] and `sign_shares` [num_samples, 2], see `adapted`, are identical on every rank,
        so the next kernel is, too.
        """
        if self._budget is None:
            return {"kernel_c2": np.full(2, np.nan), "expected_w": np.full(2, np.nan)}
        used = np.array(self._c2)
        self._kernel, expected = adapted(self._kernel, self._budget, log_w, sign_shares, self._estimated)
        self._estimated.append((~np.isnan(expected)).tolist())
        return {"kernel_c2": used, "expected_w": expected}

    @property
    def _c2(self) -> list[float]:
        return [self._kernel.positive[1], self._kernel.negative[1]]
