"""--load and --ckpt-step: decides which checkpoint a run resumes from, before anything starts."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.arguments.checkpoint import SaveSettings
from megatron_vespo.checkpoints.names import TRACKER_NAME
from megatron_vespo.checkpoints.run_folder import newest_step, resumed_save, saved_steps
from megatron_vespo.checkpoints.set_aside import RECORD, has_gone_back, kept_step, later_steps, next_place

# Commands that differ only in these are the same command: they may change when a job is restarted. The last
# two are what submit adds to say that its job has GPUs.
_NOT_OF_THE_COMMAND = {
    "load", "ckpt_step", "ray_address", "setup_seconds", "distributed_backend", "transformer_impl",
}  # fmt: skip


def resolve_load(args: Namespace, explicit: Mapping[str, Any]) -> None:
    """Sets `args.save` and `args.load` to absolute folders and `args.ckpt_step` to the step (None: newest).

    `--load DIR/iter_0000008` is `--load DIR --ckpt-step 8`. If the same command went back before and has
    saved since, it resumes from its newest checkpoint: a restarted job must not go back for ever.
    `args.gone_back` is the request to go back, None without one. `explicit` are the flags given. ValueError
    for a missing checkpoint.
    """
    args.save, args.load = (folder and str(Path(folder).resolve()) for folder in (args.save, args.load))
    args.gone_back = None
    if args.load == "":  # set by commands that only read the flags
        args.ckpt_step = None
        return
    _split(args)
    if args.ckpt_step is None:
        _check_tracker(args)
        return
    if args.load is None:
        raise ValueError(f"--ckpt-step {args.ckpt_step} needs --load, the folder of its checkpoint")
    flags = {name: str(value) for name, value in explicit.items() if name not in _NOT_OF_THE_COMMAND}
    flags["sglang_flags"] = " ".join(args.sglang_flags)
    args.gone_back = {"load": args.load, "step": args.ckpt_step, "flags": dict(sorted(flags.items()))}
    if args.save and has_gone_back(Path(args.save), args.gone_back):
        args.load, args.ckpt_step = args.save, None
        return
    steps = saved_steps(Path(args.load))
    if args.ckpt_step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise ValueError(f"--ckpt-step {args.ckpt_step}: no checkpoint of that step in {args.load}, {there}")


def _split(args: Namespace) -> None:
    name = re.fullmatch(r"iter_(\d+)", Path(args.load).name) if args.load else None
    if name is None:
        return
    step = int(name[1])
    if args.ckpt_step not in (None, step):
        raise ValueError(
            f"--load {args.load} is of step {step}, --ckpt-step is {args.ckpt_step}: leave one out"
        )
    args.load, args.ckpt_step = str(Path(args.load).parent), step


def _check_tracker(args: Namespace) -> None:
    """Checks that --load has a checkpoint. If --save is the same folder, it may be empty: resume or begin."""
    if args.load and args.load != args.save and not (Path(args.load) / TRACKER_NAME).is_file():
        raise ValueError(f"--load {args.load}: no checkpoint there ({TRACKER_NAME} is missing)")


def resumed_folder(settings: SaveSettings) -> Path | None:
    """The checkpoint that a run resumes from; None without one, or for converted weights."""
    return resumed_save(Path(settings.load), settings.ckpt_step) if settings.load else None


def describe(settings: SaveSettings, step: int) -> list[str]:
    """Lines to log about a run that has loaded optimizer step `step` (0: none)."""
    lines = []
    save = Path(settings.save) if settings.save else None
    here = save is not None and settings.ckpt_step is None and settings.load == settings.save
    if save and here and settings.gone_back is not None:
        lines.append(
            f"this command has gone back to optimizer step {settings.gone_back['step']} before and goes on "
            f"from there; to go back once more remove {save / RECORD}"
        )
    if save and (later := later_steps(save, kept_step(settings.load, settings.save, step))):
        lines.append(
            f"{settings.save} has checkpoints of other training, optimizer steps "
            f"{', '.join(map(str, later))}: the first save moves them to {next_place(save)}"
        )
    return lines


def how_to_go_on(settings: SaveSettings, step: int) -> str:
    """The flags that resume a run from optimizer step `step`, which is in --save."""
    assert settings.save is not None
    named = newest_step(Path(settings.save)) == step
    return f"--load {settings.save}" + ("" if named else f" --ckpt-step {step}")
