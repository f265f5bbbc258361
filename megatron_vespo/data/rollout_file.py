"""Writes and reads recorded rollout batches, each a .npz file of plain arrays with all that training needs.

G groups of K completions, P tokens per prompt:

    prompt_ids int64 [G], prompt_lengths int64 [G], prompt_tokens int32 [sum P]
    completion_arrays.py's arrays of the G K completions, group after group
    metric_names str, metric_values float64   over everything that was generated for the batch
    run str   a JSON object: the values that a run that trains on it must share, and consumed_prompts

numpy's float32 and float64 are restored bit-exact. The file contains no pickle.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.data.completion_arrays import completion_arrays, completions_of, end_to_end, split
from megatron_vespo.system.disk import replacing
from megatron_vespo.types import Completion, Prompt

Group = list[Completion]

# names in records of version 0.1
_OLD_NAMES = {"--mini-batches": "--steps-per-rollout", "--num-completions": "--group-size"}


@dataclass
class RolloutRecord:
    """A scored rollout batch. `run` has the values that must agree: see `check_record`."""

    groups: list[Group]
    metrics: dict[str, float]
    consumed_prompts: int  # after this batch
    run: dict[str, Any]


def batch_path(folder: Path, batch: int) -> Path:
    """Return the path of rollout batch `batch`, counted from 0."""
    return folder / f"batch-{batch:06d}.npz"


def write_record(path: Path, record: RolloutRecord) -> None:
    """Write or replace `path` atomically: if the process is killed, the old file stays."""
    completions = [completion for group in record.groups for completion in group]
    prompts = [group[0].prompt for group in record.groups]
    arrays = {
        "prompt_ids": np.array([prompt.prompt_id for prompt in prompts], np.int64),
        "prompt_lengths": np.array([len(prompt.token_ids) for prompt in prompts], np.int64),
        "prompt_tokens": end_to_end([prompt.token_ids for prompt in prompts], np.int32),
        **completion_arrays(completions),
        "metric_names": np.array(list(record.metrics), str),
        "metric_values": np.array(list(record.metrics.values()), np.float64),
        "run": np.array(json.dumps(record.run | {"consumed_prompts": record.consumed_prompts})),
    }
    with replacing(path) as stream:
        np.savez(stream, **arrays)


def read_record(path: Path) -> RolloutRecord:
    """Read a record; its prompts have tokens but no text. One-line ValueError if the file is not a record."""
    arrays = _load(path)
    run = json.loads(str(arrays["run"]))
    prompts = [
        Prompt(int(prompt_id), tokens, answer="", text="")
        for prompt_id, tokens in zip(
            arrays["prompt_ids"], split(arrays["prompt_tokens"], arrays["prompt_lengths"]), strict=True
        )
    ]
    size = len(arrays["completion_lengths"]) // len(prompts)
    completions = completions_of(arrays, [prompt for prompt in prompts for _ in range(size)])
    return RolloutRecord(
        groups=[completions[i : i + size] for i in range(0, len(completions), size)],
        metrics=dict(zip(map(str, arrays["metric_names"]), map(float, arrays["metric_values"]), strict=True)),
        consumed_prompts=run.pop("consumed_prompts"),
        run=run,
    )


def recorded_lengths(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return token counts of the prompts [groups] and completions [groups, n] of all batches in `folder`.

    Given tokens are included: these are the lengths that must fit into memory.
    """
    prompts, completions = [], []
    for path in sorted(folder.glob("batch-*.npz")):
        arrays = _load(path, "prompt_lengths", "completion_lengths")
        prompts.append(arrays["prompt_lengths"])
        completions.append(arrays["completion_lengths"].reshape(len(prompts[-1]), -1))
    if not prompts or len({lengths.shape[1] for lengths in completions}) > 1:
        raise ValueError(f"{folder}: not the batches of one run with --save-rollouts")
    return np.concatenate(prompts), np.concatenate(completions)


def check_record(
    path: Path, run: Mapping[str, Any], needs_routes: bool = False, needs_teacher: bool = False
) -> None:
    """ValueError if the record's run differs from `run` in a value, or lacks needed routes or scores."""
    small = _load(path, "run", optional=["teacher_scored"])  # routes and log-probs may have gigabytes
    stored = json.loads(str(small["run"]))
    recorded = {_OLD_NAMES.get(name, name): value for name, value in stored.items()}
    for name, value in run.items():
        if recorded.get(name) != value:
            raise ValueError(f"{path} was recorded with {name} {recorded.get(name)}, this run has {value}")
    if needs_teacher and not small.get("teacher_scored", np.zeros(1, bool)).all():
        raise ValueError(f"{path} has no log-probs of a teacher: record with a teacher, or leave it out here")
    if not needs_routes:
        return
    arrays = _load(path, "routed", "num_retractions")
    if not (arrays["routed"] | (arrays["num_retractions"] > 0)).all():
        raise ValueError(
            f"{path} has no routes, which --routing-replay R3 replays: record with --routing-replay R3, or "
            "leave it out here"
        )


def _load(path: Path, *names: str, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Return the arrays with these names, the optional ones if they are there; without names, all."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            there = [name for name in optional if name in stored.files]
            return {name: stored[name] for name in [*names, *there] or stored.files}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; it must be a recorded rollout batch") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a recorded rollout batch: {error}") from error
