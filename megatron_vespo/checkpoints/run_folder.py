"""The files around Megatron's own ones in a checkpoint, which make it one atomic unit.

    SAVE/latest_checkpointed_iteration.txt      names the last complete iteration: written last
    SAVE/iter_0000040/                          weights, optimizer, arguments: Megatron's
    SAVE/iter_0000040/rollout_buffer.bin        the state of asynchronous generation, if there is one
    SAVE/iter_0000040/canary.npz                a few samples and the policy's log-probs of them
    SAVE/iter_0000040/prompts.npz               which prompts the run trains on
    SAVE/iter_0000040/hf/                       configuration and tokenizer

Length and SHA-256 of the three are in the state that Megatron's arguments carry.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.checkpoints.hf_shards import copy_companions
from megatron_vespo.checkpoints.names import COMPLETE_NAME, HF_FOLDER, RESERVE_NAME, TRACKER_NAME
from megatron_vespo.system.disk import write_atomically

# Taken while tensors are written and given back for the indices: where the disk is full, the save must fail
# on all ranks and not on the one that writes the indices.
RESERVE_BYTES = 32 * 2**20
GIB = 2**30

Entry = dict[str, int | str]  # of a file: "bytes" and "sha256"


@dataclass(frozen=True)
class SaveReport:
    """How a save has ended, the same on every rank."""

    iteration: int
    seconds: float  # from its start until the tracker named it
    num_bytes: int
    problem: str | None = None  # what went wrong; nothing is left of it then


def entry_of(content: bytes) -> Entry:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def prepare(save: Path, folder: Path, hf_checkpoint: Path, files: Mapping[str, bytes]) -> dict[str, Entry]:
    """A new `folder` with everything but Megatron's files; OSError where there is no room.

    What a killed save has left there goes first. Where the tracker names this folder, of a run that this one
    repeats, the tracker goes before it: an iteration that is named is complete at every moment.
    """
    if folder.exists():
        if newest_save(save) == folder:
            (save / TRACKER_NAME).unlink()
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with (folder / RESERVE_NAME).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
    for name, content in files.items():
        write_atomically(folder / name, content)
    (folder / HF_FOLDER).mkdir()
    copy_companions(hf_checkpoint, folder / HF_FOLDER)
    return {name: entry_of(content) for name, content in files.items()}


def release_reserve(folder: Path) -> None:
    (folder / RESERVE_NAME).unlink(missing_ok=True)


def why_no_room(save: Path, needed: int) -> str | None:
    """The reason not to begin, or None. `needed` bytes are still to be written."""
    if shutil.disk_usage(save).free >= needed:
        return None
    return f"{free_space(save)}, {needed / GIB:.2f} GiB are needed"


def free_space(save: Path) -> str:
    return f"{save} has {shutil.disk_usage(save).free / GIB:.2f} GiB free"


def read_file(folder: Path, name: str, entry: Entry) -> bytes:
    """The file as it was saved; ValueError with one line if it is not there or another."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"--load {path}: the file is missing, the checkpoint is not complete")
    content = path.read_bytes()
    found = entry_of(content)
    if found != entry:
        raise ValueError(
            f"--load {path}: broken: {found['bytes']} bytes with SHA-256 {found['sha256']}, it was saved "
            f"with {entry['bytes']} bytes and {entry['sha256']}"
        )
    return content


def step_folder(folder: Path, step: int) -> Path:
    """Of one optimizer step, as Megatron names it."""
    return folder / f"iter_{step:07d}"


def saved_steps(folder: Path) -> list[int]:
    """The optimizer steps whose checkpoints in `folder` are complete, ascending."""
    numbers = (path.name.removeprefix("iter_") for path in folder.glob("iter_*"))
    steps = sorted(int(number) for number in numbers if number.isdecimal())
    return [step for step in steps if (step_folder(folder, step) / COMPLETE_NAME).is_file()]


def newest_step(folder: Path) -> int | None:
    """The step that the tracker names; None without one, or where it names converted weights."""
    tracker = folder / TRACKER_NAME
    word = tracker.read_text().strip() if tracker.is_file() else ""
    return int(word) if word.isdecimal() else None


def newest_save(save: Path) -> Path | None:
    """The folder that the tracker names; None without one, or where it names converted weights."""
    step = newest_step(save)
    return None if step is None else step_folder(save, step)


def resumed_save(load: Path, step: int | None = None) -> Path | None:
    """The folder that a run with --load, and --ckpt-step, goes on from; None where it begins anew.

    Also where a kill has left the tracker empty.
    """
    return step_folder(load, step) if step is not None else newest_save(load) or _torn_save(load)


def repair_tracker(save: Path) -> str | None:
    """Fills a tracker that a kill has left empty; the folder it names then, None if there was nothing to do.

    Megatron truncates it and writes anew, when the iteration that it will name is complete: the newest one
    that is. A first save's empty tracker without a complete iteration goes.
    """
    tracker = save / TRACKER_NAME
    if not tracker.is_file() or tracker.read_text().strip():
        return None
    complete = _torn_save(save)
    if complete is None:
        tracker.unlink()
        return None
    write_atomically(tracker, str(int(complete.name.removeprefix("iter_"))))
    return complete.name


def _torn_save(save: Path) -> Path | None:
    """The newest complete iteration, where the tracker is empty."""
    tracker = save / TRACKER_NAME
    if not tracker.is_file() or tracker.read_text().strip():
        return None
    steps = saved_steps(save)
    return step_folder(save, steps[-1]) if steps else None
