"""Every policy loss by name. A new one is a function of `LossInputs`, a line here, and a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_vespo.algorithms.losses import bapo, clipped, dppo, m2po, weighted
from megatron_vespo.algorithms.losses.aggregation import Aggregation
from megatron_vespo.algorithms.losses.inputs import LossInputs, Reduce, TokenLoss
from megatron_vespo.algorithms.vespo import GammaKernel


@dataclass(frozen=True)
class PolicyLoss:
    """A loss with its options, ready for a micro-batch; those with the same are equal in any process."""

    function: Callable[..., TokenLoss]
    options: dict[str, Any]
    adapt: Callable[..., dict[str, Any]] | None = None  # takes the options, its result are the function's

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        assert self.adapt is None, "a loss that looks at the whole optimizer step is adapted to it first"
        return self.function(inputs, **self.options)

    @property
    def clip_bounds(self) -> tuple[float, float] | None:
        """Of the ratio; None where the loss has none, or has not chosen them yet."""
        return (1.0 - self.options["low"], 1.0 + self.options["high"]) if "low" in self.options else None

    def with_options(self, **changed: Any) -> PolicyLoss:
        return replace(self, options=self.options | changed)

    def adapted(self, batch: Sequence[LossInputs], reduce: Reduce) -> PolicyLoss:
        """For one optimizer step, of which `batch` is this rank's part; itself if it does not adapt."""
        if self.adapt is None:
            return self
        with torch.no_grad():
            return PolicyLoss(self.function, self.adapt(batch, reduce, **self.options))


@dataclass(frozen=True)
class Method:
    """A loss and its defaults, those of the method's authors; docs/guides/losses.md compares others'.

    `aggregation` is token-mean, as in the VESPO paper, but where the method's own paper has another one.
    `adapt` chooses the loss's options by all of an optimizer step's inputs, before the first backward pass.
    """

    loss: Callable[..., TokenLoss]
    aggregation: Aggregation = "token-mean"
    clip_range: tuple[float, float] | None = None  # (low, high) of 1 - low, 1 + high
    clip_options: tuple[str, str] = ("low", "high")  # the function's names for them; DPPO's are divergences
    tau: tuple[float, float] | None = None  # where A > 0, elsewhere
    adapt: Callable[..., dict[str, Any]] | None = None
    target: float | None = None  # what `adapt` aims at
    dual_clip: bool = False  # whether it may be capped where A < 0; off as long as nobody asks
    uses_kernel: bool = False
    token_ratio: bool = False  # weighs each token by its own ratio instead of the response by W

    def bind(
        self,
        kernel: GammaKernel,
        clip_range: tuple[float, float] | None = None,
        tau: tuple[float, float] | None = None,
        target: float | None = None,
        dual_clip: float | None = None,
    ) -> PolicyLoss:
        """The loss with its options; None takes the method's own."""
        options: dict[str, Any] = {}
        if self.uses_kernel:
            options["kernel"] = kernel
        if self.clip_range is not None:
            options |= zip(self.clip_options, clip_range or self.clip_range, strict=True)
        if self.tau is not None:
            options["tau_positive"], options["tau_negative"] = tau or self.tau
        if self.target is not None:
            options["target"] = self.target if target is None else target
        if self.dual_clip and dual_clip is not None:
            options["dual_clip"] = dual_clip
        return PolicyLoss(self.loss, options, self.adapt)


MEAN_OF_MEANS: Aggregation = "sequence-mean-token-mean"
DIVERGENCES = ("delta_low", "delta_high")

# lower bounds of 1 are none: a ratio is never below 0
METHODS: dict[str, Method] = {
    "vespo": Method(weighted.vespo, uses_kernel=True),
    "vespo-mean": Method(weighted.vespo_mean, uses_kernel=True),
    "vespo-sqrt": Method(weighted.vespo_sqrt, uses_kernel=True),
    "grpo": Method(clipped.grpo, clip_range=(0.2, 0.28), dual_clip=True, token_ratio=True),
    "dr-grpo": Method(
        clipped.grpo, aggregation="constant", clip_range=(0.2, 0.2), dual_clip=True, token_ratio=True
    ),
    "gspo": Method(clipped.gspo, aggregation=MEAN_OF_MEANS, clip_range=(3e-4, 4e-4)),
    "sapo": Method(clipped.sapo, aggregation=MEAN_OF_MEANS, tau=(1.0, 1.05), token_ratio=True),
    "cispo": Method(weighted.cispo, clip_range=(1.0, 0.28), token_ratio=True),
    "bapo": Method(clipped.grpo, adapt=bapo.bounds, target=0.4, dual_clip=True, token_ratio=True),
    "m2po": Method(m2po.m2po, adapt=m2po.smallest_masked, target=0.04, token_ratio=True),
    "dppo-tv": Method(dppo.dppo_tv, clip_range=(0.15, 0.15), clip_options=DIVERGENCES, token_ratio=True),
    "dppo-kl": Method(dppo.dppo_kl, clip_range=(0.05, 0.05), clip_options=DIVERGENCES, token_ratio=True),
    "topr": Method(weighted.topr, aggregation=MEAN_OF_MEANS),
    "sequence-is": Method(weighted.sequence_importance_sampling),
    "reinforce": Method(weighted.reinforce),
}
