"""A run with nothing left to do, told from its files: before torch and Megatron are imported, for seconds."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_vespo.system.paths import path_word, user_path

_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's


def why_finished(args: Namespace, folder: Path, step: int) -> str | None:
    """What to tell people where neither training nor export nor summary is left to do; else None.

    `step` is how many optimizer steps the checkpoint in `folder` has done. Of `args` it needs load,
    train_iters, output_dir and hf_export.
    """
    if step < args.train_iters:
        return None
    export, summary = args.output_dir / "hf", args.output_dir / "summary.json"
    try:
        result = json.loads(summary.read_text())
        paths = result["paths"]
        known = paths.get("checkpoint"), result.get("steps")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if known != (args.load, step):  # another run's
        return None
    if args.hf_export and not ("HF export" in paths and export.is_dir()):
        return None
    left = f"; HF export in {export}" if args.hf_export else ""
    return f"{step} of {args.train_iters} steps are done: {folder}{left}, summary in {summary}"


def finished_by_files(argv: Sequence[str]) -> str | None:
    """`why_finished` of a command line, as far as a few flags and the tracker of --load tell; else None.

    What is wrong with the others is not looked at: nothing will run.
    """
    args = _few_flags(argv)
    if args is None or None in (args.load, args.train_iters, args.output_dir) or args.ckpt_step is not None:
        return None
    load = Path(args.load).resolve()
    try:
        step = int((load / _TRACKER).read_text())
    except (OSError, ValueError):  # nothing saved yet, or what the whole start-up knows better
        return None
    folder = load / f"iter_{step:07d}"
    args.load = str(load)
    return why_finished(args, folder, step) if folder.is_dir() else None


def _few_flags(argv: Sequence[str]) -> Namespace | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--load", type=path_word)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--train-iters", type=int)
    parser.add_argument("--output-dir", type=user_path)
    parser.add_argument("--no-hf-export", action="store_false", dest="hf_export")
    try:
        return parser.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        return None
