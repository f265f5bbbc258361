"""Builds a policy for a notebook or a script; docs/guides/python-api.md shows examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.system.ports import find_free_port

if TYPE_CHECKING:
    from megatron_vespo.trainer.policy import MegatronPolicy

HOST = "127.0.0.1"


def build_policy(
    hf_checkpoint: str | Path,
    *,
    train_iters: int,
    lr: float,
    loss: LossSettings | None = None,
    flags: Sequence[str] = (),
) -> MegatronPolicy:
    """A policy on one rank in this process, with the weights of an HF folder. Call it once per process.

    Args:
        train_iters: optimizer steps, for the learning rate's schedule.
        lr: the largest learning rate.
        loss: settings of the loss; None uses the defaults of the command line.
        flags: more flags of `megatron-vespo train` or of Megatron, such as ["--bf16"].

    Raises ValueError, in one line, if these flags, loss or model cannot be trained.
    """
    from megatron_vespo.arguments.parse import parse_args  # imports Megatron, which takes seconds

    argv = ["--hf-checkpoint", str(hf_checkpoint), "--train-iters", str(train_iters), "--lr", str(lr)]
    # the caller passes the samples of one optimizer step at a time
    argv += ["--steps-per-rollout", "1", *_flags(loss or LossSettings()), *flags]
    args = parse_args(argv, required=())

    from megatron_vespo.trainer.initialize import initialize
    from megatron_vespo.trainer.policy import MegatronPolicy

    args = initialize(args, 0, 0, HOST, find_free_port(HOST))
    return MegatronPolicy(args, LossSettings.of(args))


def _flags(loss: LossSettings) -> list[str]:
    """These settings as command-line flags: the parser checks their combinations."""
    flags = []
    for field in fields(loss):
        value = getattr(loss, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return flags
