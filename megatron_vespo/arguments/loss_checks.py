"""Checks of what the loss is made of: groups that have an advantage, and no loss beside the policy's."""

from __future__ import annotations

from argparse import Namespace

import numpy as np


def check_group(args: Namespace) -> None:
    """One completion a prompt has nothing to be compared with but the other prompts'."""
    if args.group_size > 1:
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
    """Megatron's losses of the router are not scaled as a policy loss is.

    Megatron 0.19.2 weighs them by all tokens of a micro-batch, prompts and padding included, and divides them
    by what the policy loss is divided by: trained tokens, or responses. The load that the first one balances
    is that of a micro-batch: it depends on packs, and on how context and tensor parallel ranks cut them.
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
