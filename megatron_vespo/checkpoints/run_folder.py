"""A run's checkpoints: our files beside Megatron's, and which iterations are complete.

    SAVE/latest_checkpointed_iteration.txt      names the newest complete iteration; written last
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

# Reserved while tensors are written, and released for the indices. So on a full disk the save fails on all
# ranks, and not only on the rank that writes the indices.
RESERVE_BYTES = 32 * 2**20
GIB = 2**30

Entry = dict[str, int | str]  # of a file: "bytes" and "sha256"


@dataclass(frozen=True)
class SaveReport:
    """The outcome of a save, the same on every rank."""

    iteration: int
    seconds: float  # from the start of the save until the tracker named it
    num_bytes: int
    problem: str | None = None  # why it failed; its files are removed then


def entry_of(content: bytes) -> Entry:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def prepare(save: Path, folder: Path, hf_checkpoint: Path, files: Mapping[str, bytes]) -> dict[str, Entry]:
    """Make `folder` and write everything but Megatron's files. OSError if the disk is full.

    Files that a killed save left in `folder` are removed. If the tracker names `folder`, the tracker is
    removed before it: at every moment, the iteration that the tracker names is complete.
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
    """The reason not to start a save of `needed` bytes, or None."""
    if shutil.disk_usage(save).free >= needed:
        return None
    return f"{free_space(save)}, {needed / GIB:.2f} GiB are needed"


def free_space(save: Path) -> str:
    return f"{save} has {shutil.disk_usage(save).free / GIB:.2f} GiB free"


def read_file(folder: Path, name: str, entry: Entry) -> bytes:
    """The content of a saved file. ValueError if it is missing or does not match `entry`."""
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
    """The folder of one optimizer step, as Megatron names it."""
    return folder / f"iter_{step:07d}"


def saved_steps(folder: Path) -> list[int]:
    """The optimizer steps whose checkpoints in `folder` are complete, ascending."""
    numbers = (path.name.removeprefix("iter_") for path in folder.glob("iter_*"))
    steps = sorted(int(number) for number in numbers if number.isdecimal())
    return [step for step in steps if (step_folder(folder, step) / COMPLETE_NAME).is_file()]


def newest_step(folder: Path) -> int | None:
    """The step that the tracker names. None without a tracker, or if it names converted weights."""
    tracker = folder / TRACKER_NAME
    word = tracker.read_text().strip() if tracker.is_file() else ""
    return int(word) if word.isdecimal() else None


def newest_save(save: Path) -> Path | None:
    """The folder that the tracker names. None without a tracker, or if it names converted weights."""
    step = newest_step(save)
    return None if step is None else step_folder(save, step)


def resumed_save(load: Path, step: int | None = None) -> Path | None:
    """The folder that a run with --load, and --ckpt-step, resumes from. None if it starts from scratch.

    If a kill left the tracker empty, this is the newest complete iteration.
    """
    return step_folder(load, step) if step is not None else newest_save(load) or _torn_save(load)


def repair_tracker(save: Path) -> str | None:
    """Fill a tracker that a kill left empty. Returns the name of the folder it then names, or None.

    Megatron truncates the tracker before it writes the new name, and does so only once that iteration is
    complete. So the right name is that of the newest complete iteration. Without one, the tracker is removed.
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
    """The newest complete iteration if the tracker is empty, else None."""
    tracker = save / TRACKER_NAME
    if not tracker.is_file() or tracker.read_text().strip():
        return None
    steps = saved_steps(save)
    return step_folder(save, steps[-1]) if steps else None
