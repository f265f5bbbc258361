"""The kernel of --vespo-budget between optimizer steps and across checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections import deque

import numpy as np

from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.algorithms.vespo_budget import adapted, window, within_bounds

STATE, ESTIMATED = "vespo_c2", "vespo_estimated"  # their places in a checkpoint's rollout state


class AdaptiveKernel:
    """Replaces the kernel of `args.loss_function` once an optimizer step; without the flag it stays.

    `rollout_state` is that of the checkpoint the run resumes from, None for a fresh start. What was stored
    there is taken out and, with the flag, goes on; c1 and the budget are those of this command.
    """

    def __init__(self, args: Namespace, rollout_state: dict | None):
        self._args = args
        state = rollout_state or {}
        stored, estimated = state.pop(STATE, None), state.pop(ESTIMATED, ())
        self._estimated: deque[list[bool]] = deque(estimated, window(args.steps_per_rollout) - 1)
        if stored is not None and args.vespo_budget is not None:
            (c1_positive, _), (c1_negative, _) = self._kernel.positive, self._kernel.negative
            self._use(
                GammaKernel(
                    (c1_positive, within_bounds(c1_positive, stored[0])),
                    (c1_negative, within_bounds(c1_negative, stored[1])),
                )
            )

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint needs."""
        if self._args.vespo_budget is None:
            return {}
        return {STATE: self._c2, ESTIMATED: list(self._estimated)}

    def step(self, log_w: np.ndarray, advantages: np.ndarray) -> dict[str, np.ndarray]:
        """Adapt the kernel to the samples of an optimizer step that used it; fields of StepResult.

        Both arrays are the same on every rank, [num_samples], and so is the next kernel.
        """
        if self._args.vespo_budget is None:
            return {"kernel_c2": np.full(2, np.nan), "expected_w": np.full(2, np.nan)}
        used = np.array(self._c2)
        kernel, expected = adapted(self._kernel, self._args.vespo_budget, log_w, advantages, self._estimated)
        self._estimated.append((~np.isnan(expected)).tolist())
        self._use(kernel)
        return {"kernel_c2": used, "expected_w": expected}

    @property
    def _kernel(self) -> GammaKernel:
        return self._args.loss_function.options["kernel"]

    @property
    def _c2(self) -> list[float]:
        return [self._kernel.positive[1], self._kernel.negative[1]]

    def _use(self, kernel: GammaKernel) -> None:
        self._args.loss_function = self._args.loss_function.with_options(kernel=kernel)
