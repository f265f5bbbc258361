"""Flags of the policy loss, its ratios and the advantages."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from megatron_vespo.algorithms.advantages import ADVANTAGE_ESTIMATORS
from megatron_vespo.algorithms.corrections import CORRECTIONS, why_forbidden
from megatron_vespo.algorithms.losses.aggregation import AGGREGATIONS
from megatron_vespo.algorithms.losses.settings import LossSettings, OldPolicyName
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import DECOUPLED, RATIO_DENOMINATORS
from megatron_vespo.algorithms.vespo_budget import c2_bounds


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy loss")
    add = group.add_argument
    default = LossSettings()
    add("--policy-loss", choices=METHODS, default=default.policy_loss, help="see docs/guides/losses.md")
    add("--loss-aggregation", choices=AGGREGATIONS, help="default: " + _default_aggregations())
    add("--clip-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="ratios are clipped to 1 - LOW .. 1 + HIGH; dppo: largest divergence where A < 0, A > 0; "
        "default: " + _defaults_of("clip_range"))  # fmt: skip
    add("--dual-clip", type=float, metavar="C",
        help="where A < 0, ratios above C get no gradient, 3 in verl; default: none")  # fmt: skip
    add("--sapo-tau", type=float, nargs=2, metavar=("POSITIVE", "NEGATIVE"),
        help="of SAPO's gate, by the sign of the advantage; default: " + _defaults_of("tau"))  # fmt: skip
    add("--loss-target", type=float, metavar="VALUE",
        help="bapo: positive share of the loss to reach; m2po: mean square of log ratios not to exceed; "
        "default: " + _defaults_of("target"))  # fmt: skip
    add("--steps-per-rollout", type=int, default=8, help="optimizer steps per rollout batch, the paper's N")
    add("--vespo-positive", type=float, nargs=2, default=list(default.vespo_positive), metavar=("C1", "C2"),
        help="phi(W) = W^C1 exp(C2 (1 - W)) where the advantage is >= 0")  # fmt: skip
    add("--vespo-negative", type=float, nargs=2, default=list(default.vespo_negative), metavar=("C1", "C2"),
        help="the same where it is < 0")  # fmt: skip
    add("--vespo-budget", type=float, metavar="C",
        help="adapt C2 so that E[phi W] / E[phi] <= C, by sign; default: fixed")  # fmt: skip
    add("--ratio-denominator", choices=RATIO_DENOMINATORS, default=default.ratio_denominator,
        help="W against: pi_old of the trainer; the engine's log-probs; the first, times an engine ratio "
        "truncated whole or per token")  # fmt: skip
    add("--old-policy", choices=get_args(OldPolicyName), default=default.old_policy,
        help="pi_old: the weights when a batch is prepared; those of each token; a moving average (a resume "
        "begins the last two anew)")  # fmt: skip
    add("--old-policy-snapshots", type=int, default=default.old_policy_snapshots, metavar="K",
        help="policy versions that snapshot keeps in CPU memory")  # fmt: skip
    add("--ewma-decay", type=float, default=default.ewma_decay,
        help="share of older weights in ewma's average after a step")  # fmt: skip
    add("--mismatch-truncation", type=float, default=default.mismatch_truncation,
        help="upper bound of that engine ratio")  # fmt: skip
    add("--mismatch-correction", choices=CORRECTIONS, default=default.mismatch_correction,
        help="weight or mask by pi_old / engine, per token or response")  # fmt: skip
    add("--mismatch-bounds", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="of that correction; default: " + _defaults_of("bounds", CORRECTIONS))  # fmt: skip
    add("--routing-replay", choices=("R2", "R3"),
        help="replay expert choices of pi_old (R2) or of the engine (R3)")  # fmt: skip
    add("--advantage-estimator", choices=ADVANTAGE_ESTIMATORS, default=default.advantage_estimator,
        help="see docs/guides/losses.md")  # fmt: skip
    add("--pair-length-gap", type=float, default=default.pair_length_gap, metavar="SHARE",
        help="of equal-length-pairs: largest difference of their lengths")  # fmt: skip
    add(
        "--max-logprob-difference",
        type=float,
        help="end the run if log-probs of engine and trainer differ by more",
    )


def _default_aggregations() -> str:
    """Each loss's default as text: the rare ones with their losses' names, then the most frequent one."""
    losses: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        losses.setdefault(method.aggregation, []).append(name)
    *few, most = sorted(losses, key=lambda aggregation: len(losses[aggregation]))
    return "; ".join([f"{aggregation} of {', '.join(losses[aggregation])}" for aggregation in few] + [most])


def _defaults_of(option: str, table: Mapping[str, Any] = METHODS) -> str:
    """The default of an option for each entry of `table`, as text; equal ones stand together."""
    names: dict[str, list[str]] = {}
    for name, entry in table.items():
        if value := getattr(entry, option):
            names.setdefault(_plain(value), []).append(name)
    return "; ".join(f"{', '.join(of_value)} {value}" for value, of_value in names.items())


def _plain(value: float | tuple[float, float]) -> str:
    return " ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))


def check_loss(args: Namespace) -> None:
    """All checks that need no model."""
    check_group(args)
    for name in ("vespo_positive", "vespo_negative"):
        c1, c2 = getattr(args, name)
        if not (0 <= c1 < math.inf and 0 <= c2 < math.inf):
            raise ValueError(
                f"--{name.replace('_', '-')} {c1:g} {c2:g}: exponents must be finite and not negative"
            )
    _check_loss(args)
    _check_correction(args)
    _check_budget(args)
    _check_old_policy(args)
    _check_pairs(args)
    if args.routing_replay == "R2" and args.ratio_denominator == "rollout":
        raise ValueError(
            "--routing-replay R2 replays the routes of pi_old, which --ratio-denominator rollout does not "
            "compute: use R3, or another denominator"
        )


def _check_loss(args: Namespace) -> None:
    method = METHODS[args.policy_loss]
    if args.ratio_denominator in DECOUPLED and method.token_ratio:
        raise ValueError(
            f"--policy-loss {args.policy_loss} weighs tokens, --ratio-denominator {args.ratio_denominator} "
            "weighs whole responses: use recomputed or rollout"
        )
    for flag, given, default in (
        ("--clip-range", args.clip_range, method.clip_range),
        ("--sapo-tau", args.sapo_tau, method.tau),
        ("--loss-target", args.loss_target, method.target),
        ("--dual-clip", args.dual_clip, method.dual_clip or None),
    ):
        if given is not None and default is None:
            raise ValueError(f"{flag} has no effect on --policy-loss {args.policy_loss}: leave it out")
        if isinstance(given, list) and not all(0 < value < math.inf for value in given):
            raise ValueError(f"{flag} {given[0]:g} {given[1]:g}: both must be positive and finite")
    if args.loss_target is not None and not 0 < args.loss_target < 1:
        raise ValueError(f"--loss-target {args.loss_target:g}: must be between 0 and 1")
    if args.dual_clip is not None and not 1 < args.dual_clip < math.inf:
        raise ValueError(f"--dual-clip {args.dual_clip:g}: must be above 1 and finite")


def _check_correction(args: Namespace) -> None:
    name, bounds = args.mismatch_correction, args.mismatch_bounds
    loss, denominator = args.policy_loss, args.ratio_denominator
    reason = why_forbidden(name, denominator, METHODS[loss].token_ratio)
    if reason is not None:
        raise ValueError(
            f"--mismatch-correction {name} with --ratio-denominator {denominator} and --policy-loss {loss}: "
            f"{reason}"
        )
    if bounds is None:
        return
    correction = CORRECTIONS[name]
    given = f"--mismatch-bounds {bounds[0]:g} {bounds[1]:g}"
    if correction.bounds is None:
        raise ValueError(f"{given} has no effect on --mismatch-correction {name}: leave it out")
    if not (0 <= bounds[0] <= correction.agreement <= bounds[1] < math.inf and bounds[0] < bounds[1]):
        raise ValueError(
            f"{given}: LOW must be at least 0, HIGH finite and above it, and {correction.agreement:g}, "
            f"which --mismatch-correction {name} compares where engine and trainer agree, between them"
        )


def _check_budget(args: Namespace) -> None:
    if args.vespo_budget is None:
        return
    if args.policy_loss != "vespo":
        raise ValueError(
            f"--vespo-budget bounds the W of --policy-loss vespo, {args.policy_loss} has another weight: "
            "leave it out"
        )
    if not 0 < args.vespo_budget < math.inf:
        raise ValueError(f"--vespo-budget {args.vespo_budget:g} must be positive and finite")
    for name in ("vespo_positive", "vespo_negative"):
        c1, c2 = getattr(args, name)
        where = f"--vespo-budget starts at --{name.replace('_', '-')} {c1:g} {c2:g}"
        if c1 < 1:
            raise ValueError(f"{where}: C1 must be at least 1, else nothing bounds the variance")
        low, high = c2_bounds(c1)
        if not low <= c2 <= high:
            raise ValueError(f"{where}: C2 must be between {low:.2f} and {high:.2f}")


def _check_old_policy(args: Namespace) -> None:
    where = f"--old-policy {args.old_policy}"
    if not 0 < args.ewma_decay < 1:
        raise ValueError(f"--ewma-decay is {args.ewma_decay:g}, must be between 0 and 1")
    if args.old_policy == "current":
        return
    if args.ratio_denominator == "rollout":
        raise ValueError(
            f"{where}: --ratio-denominator rollout computes no pi_old; use another or leave it out"
        )
    if args.old_policy == "snapshot" and args.routing_replay == "R2":
        raise ValueError(
            f"{where}: a response may have tokens of several versions, --routing-replay R2 replays the "
            "routes of one; use R3"
        )
    if args.old_policy == "ewma" and args.max_logprob_difference is not None:
        raise ValueError(
            f"{where}: no engine has served the average, --max-logprob-difference would compare it with one; "
            "leave one out"
        )


def _check_pairs(args: Namespace) -> None:
    if not 0 <= args.pair_length_gap < 1:
        raise ValueError(
            f"--pair-length-gap is {args.pair_length_gap:g}, must be at least 0 and below 1: a share of the "
            "longer response"
        )


def check_group(args: Namespace) -> None:
    """With one completion per prompt, a reward can only be compared with the rewards of other prompts.

    Where a teacher alone trains, no reward is compared.
    """
    if args.group_size > 1 or args.reward_coefficient == 0:
        return
    if args.advantage_estimator != "global":
        raise ValueError(
            f"--group-size 1: --advantage-estimator {args.advantage_estimator} compares the completions "
            "of a prompt and needs at least 2; global compares those of the rollout batch"
        )
    if args.dynamic_sampling:
        raise ValueError(
            "--group-size 1: --dynamic-sampling leaves out groups of equal rewards, which a group of 1 "
            "always is: leave it out"
        )
    if args.rollout_batch_size == 1:
        raise ValueError(
            "--group-size 1 with --rollout-batch-size 1: one reward has nothing to be compared with"
        )


def check_router_losses(args: Namespace) -> None:
    """Refuses Megatron's router losses, which are not scaled as a policy loss is.

    Megatron 0.19.2 weights them by all tokens of a micro-batch, including prompts and padding. It divides
    them by the policy loss's denominator: trained tokens, or responses. The auxiliary loss balances the load
    of a micro-batch, so it depends on packs, and on how context- and tensor-parallel ranks split them.
    """
    coefficients = {
        "--moe-aux-loss-coeff": args.moe_aux_loss_coeff,
        "--moe-z-loss-coeff": args.moe_z_loss_coeff,
    }
    for flag, given in coefficients.items():
        values = np.atleast_1d(given or 0.0)
        if values.any():
            shown = " ".join(f"{value:g}" for value in values)
            raise ValueError(
                f"{flag} {shown}: Megatron divides this loss by the denominator of --loss-aggregation, its "
                "size would depend on that, on packs and on the layout: leave it out"
            )
