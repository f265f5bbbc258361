"""Provides pi_old: the current weights, the weights that generated each token, or a moving average of them.

In asynchronous training the weights at the time a batch is prepared are not those that generated it
("missing old logits", arXiv 2605.12070). This module keeps copies of weights on the CPU, see `weight_copies`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.data.shards import SampleOutline
from megatron_vespo.trainer.weight_copies import copies, swapped, weights_of


class CurrentWeights:
    """pi_old is the policy at the time the batch is prepared."""

    def advance(self, version: int) -> None:
        """Called after every optimizer step, with the policy version that it produced."""

    def weights(self) -> AbstractContextManager:
        """A pass inside computes pi_old."""
        return nullcontext()


class MovingAverage:
    """pi_old uses an exponential moving average of the weights (PPO-EWMA, arXiv 2110.00641).

        average_n = sum_i decay^(n - i) weights_i / sum_i decay^(n - i),   i = 0 (the start) .. n

    It is float32: bfloat16 would round small updates away. It is not saved, so it starts from the loaded
    weights, also after a resume.
    """

    def __init__(self, model: list, decay: float, complete: Callable[[], None]):
        self._model, self._decay, self._complete = model, decay, complete
        self._average = [tensor.float() for tensor in copies(model)]
        self._total = 1.0  # the sum of the powers of decay

    @torch.no_grad()
    def advance(self, version: int) -> None:
        self._complete()
        self._total = self._decay * self._total + 1.0
        for average, weight in zip(self._average, weights_of(self._model), strict=True):
            average.lerp_(weight.to("cpu", torch.float32), 1.0 / self._total)

    def weights(self) -> AbstractContextManager:
        return swapped(self._model, self._average)


class Snapshots:
    """pi_old is, for each token, the policy version that generated it. The last `num_kept` versions are kept.

    Versions before the start of this process are gone, also after a resume. Samples of older versions are
    refused; the engines start with the loaded weights.
    """

    def __init__(self, model: list, num_kept: int, version: int, complete: Callable[[], None]):
        self._model, self._num_kept, self._complete = model, num_kept, complete
        self._kept: dict[int, list[Tensor]] = {}  # ascending
        self.advance(version)

    def advance(self, version: int) -> None:
        # drop the oldest first: there are never more than `num_kept` copies
        if len(self._kept) == self._num_kept:
            del self._kept[min(self._kept)]
        self._complete()
        self._kept[version] = copies(self._model)

    def versions(self, samples: Sequence[SampleOutline]) -> list[int]:
        """Versions of the samples' tokens, ascending. ValueError names a sample of a version not kept."""
        for index, sample in enumerate(samples):
            self._check(index, sample)
        return sorted({version for sample in samples for version in sample.policy_versions.versions})

    def weights(self, version: int) -> AbstractContextManager:
        """A pass inside computes log-probs of `version`, one of `versions`."""
        in_place = version == max(self._kept)
        return nullcontext() if in_place else swapped(self._model, self._kept[version])

    def _check(self, index: int, sample: SampleOutline) -> None:
        where = f"sample {index} (group {sample.group_id})"
        if len(sample.policy_versions) != sample.num_trained:
            raise ValueError(
                f"{where} has {len(sample.policy_versions)} policy_versions for {sample.num_trained} "
                "sampled tokens"
            )
        gone = sorted(set(sample.policy_versions.versions) - self._kept.keys())
        if gone:
            raise ValueError(
                f"{where} has tokens of policy version {gone[0]}, snapshots are kept of versions "
                f"{min(self._kept)} to {max(self._kept)}: raise --old-policy-snapshots {self._num_kept} or "
                "train on younger samples"
            )


OldPolicy = CurrentWeights | MovingAverage | Snapshots


def old_policy(settings: LossSettings, model: list, version: int, complete: Callable[[], None]) -> OldPolicy:
    """The old policy that --old-policy names; the weights loaded now are `version`, see `completes`."""
    if settings.old_policy != "current" and dist.get_rank() == 0:
        print(f"pi_old: {settings.old_policy}, begins with policy version {version}; nothing older is known")
    if settings.old_policy == "snapshot":
        return Snapshots(model, settings.old_policy_snapshots, version, complete)
    if settings.old_policy == "ewma":
        return MovingAverage(model, settings.ewma_decay, complete)
    return CurrentWeights()
