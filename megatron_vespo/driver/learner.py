"""Trains on a rollout batch in optimizer steps, and runs the checks that belong to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_vespo.algorithms.diagnostics import floor_metrics
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.data.sample_advantages import mean_advantage, token_advantage_metrics
from megatron_vespo.data.token_values import TOKENS
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.rollout_metrics import pi_old_is_in_place, step_metrics
from megatron_vespo.types import TrainingSample

# The floor of log W is measured every FLOOR_INTERVAL rollout batches, by two forward passes over at most
# FLOOR_RESPONSES responses and at most one of FLOOR_SHARE: well below 1% of the training time.
FLOOR_INTERVAL, FLOOR_RESPONSES, FLOOR_SHARE = 20, 32, 8


# Called after every optimizer step with its part of the samples and its StepResult's fields; returns metrics
AfterStep = Callable[[slice, dict[str, Any]], dict[str, float]]


class Learner(Protocol):
    """The training loop's interface: `PolicyLearner` trains, `NullLearner` only counts."""

    @property
    def policy_version(self) -> int:
        """The version of the weights that a weight sync sends."""
        ...

    def reference_log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray] | None:
        """The reference policy's log-probs of a rollout batch, float32 [N] per sample; None without one."""
        ...

    def update(self, samples: list[TrainingSample], after_step: AfterStep) -> dict[str, float]:
        """Trains on a rollout batch and returns its metrics."""
        ...


@dataclass
class LogProbBound:
    """--max-logprob-difference: how far engines and trainer may differ, in nats per token; None: any."""

    bound: float | None
    state: RunState  # remembers the largest difference

    def check(self, difference: float) -> None:
        """RuntimeError if `difference` is over the bound, or NaN."""
        self.state.max_logprob_difference = max(self.state.max_logprob_difference, difference)
        if self.bound is not None and not difference <= self.bound:
            raise RuntimeError(
                f"engine and trainer log-probs differ by {difference:.2e} at version {self.state.iteration}, "
                f"more than --max-logprob-difference {self.bound:g}: their weights or numerics are not the "
                "same"
            )


@dataclass
class PolicyLearner:
    """Trains the policy on rollout batches and counts the optimizer steps in `state`.

    With `compares_engines` the engines' log-probs are compared with the trainer's after every batch that the
    current policy generated.
    """

    trainer: TrainerGroup
    state: RunState
    display: RunDisplay
    steps_per_rollout: int  # optimizer steps per rollout batch
    ratio_denominator: str
    old_policy: str
    compares_engines: bool
    log_prob_bound: LogProbBound

    @property
    def policy_version(self) -> int:
        return self.state.iteration

    def reference_log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        """The reference policy's, float32 [N] per sample, from the packs that `update` trains on."""
        with self.display.phase("log-probs"):
            return self.trainer.reference_log_probs(self._mini_batches(samples))

    def _mini_batches(self, samples: list[TrainingSample]) -> list[list[TrainingSample]]:
        size = len(samples) // self.steps_per_rollout
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def update(self, samples: list[TrainingSample], after_step: AfterStep) -> dict[str, float]:
        """Take the steps of one rollout batch. A group stays together in one mini-batch.

        The values that `after_step` returns are summed into the metrics.
        """
        mini_batches = self._mini_batches(samples)
        size = len(mini_batches[0])
        with self.display.phase("log-probs"):
            self.trainer.prepare(mini_batches)
            floor = self._floor(samples)
        version = self.state.iteration
        steps, sums = [], Counter()
        for index, mini_batch in enumerate(mini_batches):
            with self.display.phase("train"):
                self.display.progress(index, len(mini_batches))
                steps.append(self.trainer.train_step(index))
            steps[-1]["lag"] = mean_lag(mini_batch, self.state.iteration)
            self.state.iteration += 1
            sums.update(after_step(slice(index * size, (index + 1) * size), steps[-1]))
            steps[-1].pop(TOKENS, None)  # large, and for observers alone
        sample_advantages = np.array([mean_advantage(sample) for sample in samples], np.float32)
        lengths = np.array([sample.num_trained for sample in samples])
        metrics = step_metrics(steps, sample_advantages, lengths, floor) | dict(sums)
        metrics |= token_advantage_metrics(samples)
        if pi_old_is_in_place(self.ratio_denominator, self.old_policy, mini_batches[0], version):
            metrics["check/unchanged_log_w_abs_max"] = float(np.abs(steps[0]["log_w"]).max())
        on_policy = all(sample.policy_versions.are_all(version) for sample in samples)
        if self.compares_engines and on_policy:
            metrics["check/max_logprob_difference"] = self._largest_log_mismatch(steps)
        return metrics

    def _largest_log_mismatch(self, steps: list[dict]) -> float:
        # if pi_old is recomputed, every mini-batch compares the same policy; otherwise only the first does
        comparable = steps if self.ratio_denominator != "rollout" else steps[:1]
        difference = float(np.concatenate([step["log_mismatch_abs_max"] for step in comparable]).max())
        self.log_prob_bound.check(difference)
        return difference

    def _floor(self, samples: list[TrainingSample]) -> dict[str, float]:
        """What rounding alone adds to log W, measured now and then on a few responses of all lengths.

        The checkpoint holds the last measurement, so a resumed run continues with it.
        """
        due = self.state.iteration % (FLOOR_INTERVAL * self.steps_per_rollout) == 0
        if self.state.log_w_floor is None or due:
            lengths = np.array([sample.num_trained for sample in samples])
            number = min(FLOOR_RESPONSES, max(len(samples) // FLOOR_SHARE, 2), len(samples))
            ranks = np.linspace(0, len(samples) - 1, number).round().astype(int)
            chosen = np.argsort(lengths, kind="stable")[ranks]
            log_w = self.trainer.log_w_floor([samples[i] for i in chosen])
            self.state.log_w_floor = floor_metrics(log_w, lengths[chosen])
        return self.state.log_w_floor


def mean_lag(samples: list[TrainingSample], version: int) -> float:
    """Return the mean over all tokens of `version` minus the version that made the token."""
    tokens = sum(len(sample.policy_versions) for sample in samples)
    return (version * tokens - sum(sample.policy_versions.total() for sample in samples)) / tokens
