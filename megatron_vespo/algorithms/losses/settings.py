"""What the loss of a run is: plain values, from which the functions follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vespo.algorithms.advantages import AdvantageEstimator
from megatron_vespo.algorithms.corrections import CORRECTIONS, BoundCorrection
from megatron_vespo.algorithms.length_pairs import LENGTH_GAP
from megatron_vespo.algorithms.losses.aggregation import Aggregation
from megatron_vespo.algorithms.losses.table import METHODS, PolicyLoss
from megatron_vespo.algorithms.vespo import GammaKernel, RatioDenominator
from megatron_vespo.system.settings import Settings

OldPolicyName = Literal["current", "snapshot", "ewma"]
Pair = tuple[float, float]


@dataclass(frozen=True)
class LossSettings(Settings):
    """One field for each flag of the loss, with the flag's name and default; plain values only.

    None stands for the value of the method's authors, see `Method`, and of the correction, see `Correction`;
    `vespo_budget` None keeps c2 fixed. A pair is (low, high), (where A > 0, elsewhere) or (c1, c2).
    """

    policy_loss: str = "vespo"  # a name in METHODS
    loss_aggregation: Aggregation | None = None
    clip_range: Pair | None = None  # ratios stay between 1 - low and 1 + high
    dual_clip: float | None = None
    sapo_tau: Pair | None = None
    loss_target: float | None = None
    vespo_positive: Pair = GammaKernel.positive
    vespo_negative: Pair = GammaKernel.negative
    vespo_budget: float | None = None
    ratio_denominator: RatioDenominator = "recomputed"
    mismatch_truncation: float = 2.0
    mismatch_correction: str = "none"  # a name in CORRECTIONS
    mismatch_bounds: Pair | None = None
    old_policy: OldPolicyName = "current"
    old_policy_snapshots: int = 4
    ewma_decay: float = 0.889
    advantage_estimator: AdvantageEstimator = "group-mean"
    pair_length_gap: float = LENGTH_GAP  # of equal-length-pairs

    @property
    def kernel(self) -> GammaKernel:
        """phi of the VESPO losses, at the start if `vespo_budget` adapts it."""
        return GammaKernel(self.vespo_positive, self.vespo_negative)

    def bind(self) -> BoundLoss:
        """The functions that the names stand for. KeyError for an unknown name."""
        method = METHODS[self.policy_loss]
        return BoundLoss(
            loss=method.bind(self.kernel, self.clip_range, self.sapo_tau, self.loss_target, self.dual_clip),
            correction=CORRECTIONS[self.mismatch_correction].bind(self.mismatch_bounds),
            aggregation=self.loss_aggregation or method.aggregation,
        )


@dataclass(frozen=True)
class BoundLoss:
    """The functions of a run's loss with their options."""

    loss: PolicyLoss
    correction: BoundCorrection
    aggregation: Aggregation
