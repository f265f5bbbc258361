"""Recognises a finished run by its files, before the seconds that importing torch and Megatron takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.names import TRACKER_NAME
from megatron_vespo.system.paths import path_word, user_path


@dataclass(frozen=True)
class Wanted:
    """What a run has to reach."""

    load: str
    train_iters: int  # optimizer steps
    output_dir: Path
    hf_export: bool


def why_finished(wanted: Wanted, folder: Path, step: int) -> str | None:
    """A message if training, export and summary are done; else None.

    `step` is how many optimizer steps the checkpoint in `folder` has done.
    """
    if step < wanted.train_iters:
        return None
    export, summary = wanted.output_dir / "hf", wanted.output_dir / "summary.json"
    try:
        result = json.loads(summary.read_text())
        paths = result["paths"]
        known = paths.get("checkpoint"), result.get("steps")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if known != (wanted.load, step):  # another run's
        return None
    if wanted.hf_export and not ("HF export" in paths and export.is_dir()):
        return None
    left = f"; HF export in {export}" if wanted.hf_export else ""
    return f"{step} of {wanted.train_iters} steps are done: {folder}{left}, summary in {summary}"


def finished_by_files(argv: Sequence[str]) -> str | None:
    """`why_finished` for a command line, from a few flags and the tracker of --load; None if unclear.

    Other flags are not checked, because nothing will run.
    """
    args = _few_flags(argv)
    if args is None or None in (args.load, args.train_iters, args.output_dir) or args.ckpt_step is not None:
        return None
    load = Path(args.load).resolve()
    try:
        step = int((load / TRACKER_NAME).read_text())
    except (OSError, ValueError):  # nothing is saved yet, or the full start-up must decide
        return None
    folder = load / f"iter_{step:07d}"
    wanted = Wanted(str(load), args.train_iters, args.output_dir, args.hf_export)
    return why_finished(wanted, folder, step) if folder.is_dir() else None


def _few_flags(argv: Sequence[str]) -> Any:
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
