"""Moves later checkpoints aside when a run resumes from an older one.

The first save of the run does so. All checkpoints of a folder then belong to one line of training:

    SAVE/set-aside-001/iter_0000012/    of steps after the one that the run began with; a rename
    SAVE/set-aside-001/latest_checkpointed_iteration.txt    names the newest of them: to be loaded like SAVE
    SAVE/gone_back.json    the last going back: to which step of which folder, and with which flags

The same command started again finds itself in that file, and goes on from SAVE's newest instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.names import TRACKER_NAME
from megatron_vespo.checkpoints.run_folder import newest_step, resumed_save, saved_steps, step_folder
from megatron_vespo.system.disk import write_atomically

_OLD_NAMES = {
    "mini_batches": "steps_per_rollout", "num_completions": "group_size", "max_dispatches": "max_attempts",
}  # fmt: skip
RECORD = "gone_back.json"


def kept_step(load: str | None, save: str | None, step: int) -> int:
    """The last step in --save that belongs to a run that began with optimizer step `step`."""
    return step if load == save else 0


def later_steps(save: Path, kept: int) -> list[int]:
    """The steps that `make_room` will set aside."""
    return [step for step in saved_steps(save) if step > kept]


def make_room(save: Path, kept: int, gone_back: dict[str, Any] | None) -> None:
    """Move the checkpoints in `save` that are later than step `kept` aside. Called before a run's first save.

    `kept` is the step that the run started from. `gone_back` is recorded, see `has_gone_back`. If the process
    is killed, the tracker is right at every moment, and the same call completes the move.
    """
    later = later_steps(save, kept)
    if newest_step(save) in later:
        if kept in saved_steps(save):
            write_atomically(save / TRACKER_NAME, str(kept))
        else:
            (save / TRACKER_NAME).unlink()
    if later:
        place = set_aside(save, [step_folder(save, step) for step in later])
        write_atomically(place / TRACKER_NAME, str(later[-1]))
    if gone_back is None:
        (save / RECORD).unlink(missing_ok=True)
    else:
        write_atomically(save / RECORD, json.dumps(gone_back, indent=1) + "\n")


def next_place(folder: Path) -> Path:
    """The folder that `set_aside` will move to."""
    taken = [path.name.removeprefix("set-aside-") for path in folder.glob("set-aside-*")]
    number = max((int(number) for number in taken if number.isdecimal()), default=0) + 1
    return folder / f"set-aside-{number:03d}"


def set_aside(folder: Path, paths: Iterable[Path]) -> Path:
    """Move these entries of `folder` into a new subfolder. Returns the subfolder."""
    place = next_place(folder)
    place.mkdir(parents=True)
    for path in paths:
        path.rename(place / path.name)
    return place


def _of_today(recorded: dict[str, Any]) -> dict[str, Any]:
    """With the flags' names of today, where version 0.1 has written it."""
    flags = {_OLD_NAMES.get(name, name): value for name, value in recorded["flags"].items()}
    flags = {name.replace("heldout_", "eval_"): value for name, value in flags.items()}
    return recorded | {"flags": flags}


def has_gone_back(save: Path, gone_back: dict[str, Any]) -> bool:
    """Whether `save` continues from exactly this return to an earlier step, with no other run in between."""
    try:
        recorded = json.loads((save / RECORD).read_text())
        return _of_today(recorded) == gone_back and resumed_save(save) is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
