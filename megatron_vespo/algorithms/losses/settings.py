"""What the loss of a run is: plain values, from which the functions follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vespo.algorithms.advantages import AdvantageEstimator
from megatron_vespo.algorithms.corrections import CORRECTIONS, BoundCorrection
from megatron_vespo.algorithms.length_pairs import LENGTH_GAP
from megatron_vespo.algorithms.losses.aggregation import Aggregation
from megatron_vespo.algorithms.losses.kl import KLKind, KLTerm
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
    reference_checkpoint: Path | None = None  # None: --hf-checkpoint
    reference_update_interval: int | None = None  # optimizer steps
    kl_coef: float | None = None  # of the penalty in the reward
    kl_loss_coef: float | None = None  # of the term in the loss; 0 only measures
    kl_loss_type: KLKind = "k3"
    unbiased_kl: float | None = None  # bound of pi / mu

    @property
    def kernel(self) -> GammaKernel:
        """phi of the VESPO losses, at the start if `vespo_budget` adapts it."""
        return GammaKernel(self.vespo_positive, self.vespo_negative)

    @property
    def uses_reference(self) -> bool:
        """Whether the reference policy's log-probs are computed."""
        return self.kl_coef is not None or self.kl_loss_coef is not None

    def bind(self) -> BoundLoss:
        """The functions that the names stand for. KeyError for an unknown name."""
        method = METHODS[self.policy_loss]
        return BoundLoss(
            loss=method.bind(self.kernel, self.clip_range, self.sapo_tau, self.loss_target, self.dual_clip),
            correction=CORRECTIONS[self.mismatch_correction].bind(self.mismatch_bounds),
            aggregation=self.loss_aggregation or method.aggregation,
            kl=KLTerm(self.kl_loss_coef, self.kl_loss_type, self.unbiased_kl) if self.kl_loss_coef else None,
        )


@dataclass(frozen=True)
class BoundLoss:
    """The functions of a run's loss with their options."""

    loss: PolicyLoss
    correction: BoundCorrection
    aggregation: Aggregation
    kl: KLTerm | None
