"""Recorded rollout batches: everything that training needs of one, in a .npz file of plain arrays.

G groups of K completions; P and C are the tokens of a prompt and of a completion, L layers, E experts a
token. What differs in length lies end to end:

    prompt_ids int64 [G], prompt_lengths int64 [G], prompt_tokens int64 [sum P]
    completion_lengths int64 [G K], completion_tokens int64, log_probs float32, policy_versions int64 [sum C]
    rewards, overlong_penalties, temperatures float64 [G K], finish_reasons str [G K]
    routes uint8 [sum (P + C - 1), L, E], absent where the model is dense
    metric_names str, metric_values float64   of everything that was generated for the batch
    run str   a JSON object: what a run that trains on it must have in common, and consumed_prompts

numpy's float32 and float64 come back bit by bit; nothing in such a file is a pickle.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.types import Completion, Prompt

Group = list[Completion]


@dataclass
class RolloutRecord:
    """A rollout batch as it was scored. `run` is what must agree: see `check_record`."""

    groups: list[Group]
    metrics: dict[str, float]
    consumed_prompts: int  # after this batch
    run: dict[str, Any]


def batch_path(folder: Path, batch: int) -> Path:
    """Of rollout batch `batch`, from 0."""
    return folder / f"batch-{batch:06d}.npz"


def write_record(path: Path, record: RolloutRecord) -> None:
    """Writes or replaces `path`; a kill meanwhile leaves what was there."""
    completions = [completion for group in record.groups for completion in group]
    prompts = [group[0].prompt for group in record.groups]
    arrays = {
        "prompt_ids": np.array([prompt.prompt_id for prompt in prompts], np.int64),
        "prompt_lengths": np.array([len(prompt.token_ids) for prompt in prompts], np.int64),
        "prompt_tokens": np.concatenate([np.array(prompt.token_ids, np.int64) for prompt in prompts]),
        "completion_lengths": np.array([len(c.token_ids) for c in completions], np.int64),
        "completion_tokens": np.concatenate([np.array(c.token_ids, np.int64) for c in completions]),
        "log_probs": np.concatenate([c.log_probs for c in completions]),
        "policy_versions": np.concatenate([c.policy_versions for c in completions]),
        "rewards": np.array([c.reward for c in completions], np.float64),
        "overlong_penalties": np.array([c.overlong_penalty for c in completions], np.float64),
        "temperatures": np.array([c.temperature for c in completions], np.float64),
        "finish_reasons": np.array([c.finish_reason for c in completions], str),
        "metric_names": np.array(list(record.metrics), str),
        "metric_values": np.array(list(record.metrics.values()), np.float64),
        "run": np.array(json.dumps(record.run | {"consumed_prompts": record.consumed_prompts})),
    }
    if completions[0].routed_experts is not None:
        arrays["routes"] = np.concatenate([c.routed_experts for c in completions])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def read_record(path: Path) -> RolloutRecord:
    """Prompts have their tokens and no text; ValueError with one line for what is no such file."""
    arrays = _load(path)
    run = json.loads(str(arrays["run"]))
    prompts = [
        Prompt(int(prompt_id), tokens.tolist(), answer="", text="")
        for prompt_id, tokens in zip(
            arrays["prompt_ids"], _split(arrays["prompt_tokens"], arrays["prompt_lengths"]), strict=True
        )
    ]
    lengths = arrays["completion_lengths"]
    size = len(lengths) // len(prompts)
    owners = [prompt for prompt in prompts for _ in range(size)]
    routes: Sequence[np.ndarray | None] = [None] * len(lengths)
    if "routes" in arrays:
        entering = np.array([len(prompt.token_ids) for prompt in owners]) + lengths - 1
        routes = _split(arrays["routes"], entering)
    completions = [
        Completion(prompt, tokens.tolist(), log_probs, versions, experts, str(finish), float(temperature),
                   float(reward), float(penalty))
        for prompt, tokens, log_probs, versions, experts, finish, temperature, reward, penalty in zip(
            owners, _split(arrays["completion_tokens"], lengths), _split(arrays["log_probs"], lengths),
            _split(arrays["policy_versions"], lengths), routes, arrays["finish_reasons"],
            arrays["temperatures"], arrays["rewards"], arrays["overlong_penalties"], strict=True,
        )
    ]  # fmt: skip
    return RolloutRecord(
        groups=[completions[i : i + size] for i in range(0, len(completions), size)],
        metrics=dict(zip(map(str, arrays["metric_names"]), map(float, arrays["metric_values"]), strict=True)),
        consumed_prompts=run.pop("consumed_prompts"),
        run=run,
    )


def recorded_lengths(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompts, [groups], and of their completions, [groups, n], of all batches in `folder`."""
    prompts, completions = [], []
    for path in sorted(folder.glob("batch-*.npz")):
        arrays = _load(path, "prompt_lengths", "completion_lengths")
        prompts.append(arrays["prompt_lengths"])
        completions.append(arrays["completion_lengths"].reshape(len(prompts[-1]), -1))
    if not prompts or len({lengths.shape[1] for lengths in completions}) > 1:
        raise ValueError(f"{folder}: not the batches of one run with --save-rollouts")
    return np.concatenate(prompts), np.concatenate(completions)


def check_record(path: Path, run: Mapping[str, Any]) -> None:
    """ValueError where the record is of a run that differs from `run` in one of its values."""
    recorded = json.loads(str(_load(path, "run")["run"]))
    for name, value in run.items():
        if recorded.get(name) != value:
            raise ValueError(f"{path} was recorded with {name} {recorded.get(name)}, this run has {value}")


def _load(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of these names, or all."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names or stored.files}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; it must be a recorded rollout batch") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a recorded rollout batch: {error}") from error


def _split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The pieces of `values` that lie end to end."""
    return np.split(values, np.cumsum(lengths)[:-1])
