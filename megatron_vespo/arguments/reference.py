"""Flags of the reference policy and of the two places that KL(pi || reference) has: reward and loss."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from typing import Any

from megatron_vespo.algorithms.losses.kl import KL_KINDS
from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.arguments.checks import check_positive
from megatron_vespo.models.hf_config import megatron_arguments, read_hf_config
from megatron_vespo.system.paths import user_path


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "reference policy", "--kl-coef BETA, --kl-loss-coef BETA ...: see docs/guides/reference-kl.md"
    )
    add = group.add_argument
    default = LossSettings()
    add("--kl-coef", type=float, metavar="BETA",
        help="subtract BETA times the response's log (mu / reference) from the reward; "
        "default: off")  # fmt: skip
    add("--kl-loss-coef", type=float, metavar="BETA",
        help="add BETA times KL(pi || reference) to the loss, aggregated as it is; 0 only measures; "
        "default: off")  # fmt: skip
    add("--kl-loss-type", choices=KL_KINDS, default=default.kl_loss_type,
        help="estimator of that KL; only k2 has its gradient")  # fmt: skip
    add("--unbiased-kl", type=float, metavar="BOUND",
        help="multiply each token's estimate by min(pi / mu, BOUND) and take the gradient of KL(pi || "
        "reference); inf: no bound; default: off")  # fmt: skip
    add("--reference-checkpoint", type=user_path, metavar="DIR",
        help="HF checkpoint of the reference policy; default: --hf-checkpoint")  # fmt: skip
    add("--reference-update-interval", type=int, metavar="N",
        help="every N optimizer steps the reference becomes the current policy; default: never")  # fmt: skip


def check_reference(args: Namespace) -> None:
    """All checks that need no model."""
    if args.reference_update_interval is not None:
        check_positive(args, ["reference_update_interval"])
    if args.kl_coef is None and args.kl_loss_coef is None:
        for name in ("reference_checkpoint", "reference_update_interval"):
            if (given := getattr(args, name)) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} {given}: no flag uses a reference policy; add --kl-coef or "
                    "--kl-loss-coef (0 only measures), or leave it out"
                )
    if args.kl_coef is not None and not 0 < args.kl_coef < math.inf:
        raise ValueError(f"--kl-coef {args.kl_coef:g}: must be positive and finite")
    if args.kl_loss_coef is not None and not 0 <= args.kl_loss_coef < math.inf:
        raise ValueError(f"--kl-loss-coef {args.kl_loss_coef:g}: must be finite and not negative")
    if not args.kl_loss_coef:
        given = [] if args.unbiased_kl is None else [f"--unbiased-kl {args.unbiased_kl:g}"]
        given += [f"--kl-loss-type {args.kl_loss_type}"] * (args.kl_loss_type != LossSettings.kl_loss_type)
        if given:
            raise ValueError(
                f"{given[0]} changes the term of --kl-loss-coef, which is off: give --kl-loss-coef or leave "
                "it out"
            )
    elif args.unbiased_kl is not None and not args.unbiased_kl >= 1:
        raise ValueError(f"--unbiased-kl {args.unbiased_kl:g}: a bound of ratios must be at least 1")
    folder = args.reference_checkpoint
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--reference-checkpoint {folder}: no such folder")


def check_reference_model(args: Namespace, hf_config: dict[str, Any]) -> None:
    """ValueError unless the reference has the architecture of --hf-checkpoint, of `hf_config`."""
    if args.reference_checkpoint is None:
        return
    ours = megatron_arguments(hf_config)
    theirs = megatron_arguments(read_hf_config(args.reference_checkpoint))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"--reference-checkpoint {args.reference_checkpoint} is another model than --hf-checkpoint: "
                f"{name} is {theirs.get(name)}, not {ours.get(name)}"
            )
