"""Writes and reads what --record-responses keeps of an optimizer step: DIR/step-NNNNNN.npz of plain arrays.

NNNNNN is the number of optimizer steps done, this one included. M samples, G distinct prompts; per sample P
prompt tokens and N sampled tokens; U distinct tokens in the file:

    prompt_of int32 [M]   index of the sample's prompt
    prompt_ids int64 [G], prompt_lengths int64 [G], prompt_tokens int32 [sum P]
    prompt_info uint8     JSON in UTF-8: a list of {"text", "answer", "source"}; "source" is "" if unknown
    completion_arrays.py's arrays of the M completions, without routes and supports; log_probs is log mu
    those of COLUMNS float32 [M], group_ids int64 [M]
    pi float32 [sum N]    log pi of every sampled token in the training pass of this step
    pi_old float32 [sum N]                 log pi_old; absent if it was not computed
    expert_differences uint8 [sum N]       see `StepRecord`; absent if no routes were imposed
    advantages_per_token float32 [sum N]   A of every sampled token; absent if it is the response's
    step, mini_batch int64                 0-dimensional
    piece_ids int32 [U], piece_lengths int32 [U], piece_bytes uint8   the text of every token, end to end
    settings uint8        JSON in UTF-8: what the weight of a response was computed with

The file is not compressed and contains no pickle. Reading needs numpy alone.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.data.completion_arrays import completion_arrays, completions_of, end_to_end, split
from megatron_vespo.system.disk import replacing
from megatron_vespo.types import Completion, Prompt

FOLDER_NAME = "responses"  # in the run's output folder
# the advantage, the mean over the tokens where they have their own; then fields of StepResult
COLUMNS = ("advantages", "log_w", "weight", "correction", "rejected", "log_mismatch_in_w", "log_mismatch")
OPTIONAL_PER_TOKEN = {
    "pi_old": np.float32, "expert_differences": np.uint8, "advantages_per_token": np.float32,
}  # fmt: skip
SOURCE_COLUMNS = ("data_source", "source")  # of a prompt file: where the row is from
_NAME = re.compile(r"step-(\d{6,12})\.npz")


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step and all samples of it. Arrays without another shape are float32 [M].

    log(pi / mu) of a token is pi - log mu; its staleness is pi - pi_old, its engine mismatch pi_old - log mu.
    """

    step: int  # optimizer steps done, this one included
    mini_batch: int  # index of the optimizer step in its rollout batch, from 0
    completions: Sequence[Completion]  # M, without routes and supports; those of one prompt share it
    group_ids: np.ndarray  # int64 [M]; samples of one prompt in one rollout batch share it
    advantages: np.ndarray
    log_w: np.ndarray
    weight: np.ndarray
    correction: np.ndarray
    rejected: np.ndarray
    log_mismatch_in_w: np.ndarray
    log_mismatch: np.ndarray
    pi: np.ndarray  # float32 [sum N], end to end
    pi_old: np.ndarray | None = None
    # uint8 [sum N]: in the pass that predicted the token, summed over layers, how many of the experts that
    # were imposed (R3: the engine's, R2: pi_old's) the router would not have chosen; 255 stands for more
    expert_differences: np.ndarray | None = None
    advantages_per_token: np.ndarray | None = None  # float32 [sum N]; None: A is the response's
    settings: Mapping[str, Any] = field(default_factory=dict)
    pieces: Mapping[int, bytes] = field(default_factory=dict)  # token -> its bytes; empty without a tokenizer

    @cached_property
    def num_sampled(self) -> np.ndarray:
        """Number of sampled tokens of each sample, N, int64 [M]."""
        return np.array([one.num_sampled for one in self.completions], np.int64)

    def per_sample(self, values: np.ndarray) -> list[np.ndarray]:
        """Cut a field of sampled tokens, such as `pi`, into one array [N] per sample."""
        return split(values, self.num_sampled)

    def text(self, token_ids: np.ndarray) -> str:
        """Return the text of some tokens of the file; "" if it has none."""
        found = b"".join(self.pieces.get(token_id, b"") for token_id in token_ids.tolist())
        return found.decode("utf-8", "replace")


def record_path(folder: Path, step: int) -> Path:
    """Return the path of the record of optimizer step `step`; `folder` is the run's responses folder."""
    return folder / f"step-{step:06d}.npz"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of all records in `folder`, in the order of the steps; none if it is missing."""
    if not folder.is_dir():
        return []
    names = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in names if name is not None)


def write_step(path: Path, record: StepRecord) -> int:
    """Write or replace `path` atomically; the number of bytes. OSError if it cannot be written."""
    with replacing(path) as stream:
        np.savez(stream, allow_pickle=False, **_arrays(record))
        return stream.tell()


def read_step(path: Path) -> StepRecord:
    """Read a record. One-line ValueError if the file is missing, damaged, or something else."""
    damaged = (
        OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
        NotImplementedError, RuntimeError, MemoryError, StopIteration, zipfile.BadZipFile, zlib.error,
    )  # fmt: skip
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):  # numpy would take it for a pickle, and advise to load it
                raise zipfile.BadZipFile("no zip archive, or only a part of one")
        with np.load(path, allow_pickle=False) as stored:
            return _record({name: stored[name] for name in stored.files})
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; it must be a step of --record-responses") from error
    except damaged as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: not a complete step of --record-responses ({why})") from error


def _arrays(record: StepRecord) -> dict[str, np.ndarray]:
    prompts, prompt_of = _distinct_prompts(record.completions)
    info = [{"text": p.text, "answer": p.answer, "source": _source(p)} for p in prompts]
    plain = [replace(one, routed_experts=None, supports=None) for one in record.completions]
    arrays = {
        "prompt_of": prompt_of,
        "prompt_ids": np.array([prompt.prompt_id for prompt in prompts], np.int64),
        "prompt_lengths": np.array([len(prompt.token_ids) for prompt in prompts], np.int64),
        "prompt_tokens": end_to_end([prompt.token_ids for prompt in prompts], np.int32),
        "prompt_info": _json(info),
        **completion_arrays(plain),
        **{name: np.asarray(getattr(record, name), np.float32) for name in COLUMNS},
        "group_ids": np.asarray(record.group_ids, np.int64),
        "pi": np.asarray(record.pi, np.float32),
        "step": np.array(record.step, np.int64),
        "mini_batch": np.array(record.mini_batch, np.int64),
        "piece_ids": np.array(list(record.pieces), np.int32),
        "piece_lengths": np.array([len(piece) for piece in record.pieces.values()], np.int32),
        "piece_bytes": np.frombuffer(b"".join(record.pieces.values()), np.uint8),
        "settings": _json(dict(record.settings)),
    }
    for name, dtype in OPTIONAL_PER_TOKEN.items():
        if (values := getattr(record, name)) is not None:
            arrays[name] = np.asarray(values, dtype)
    return arrays


def _record(arrays: Mapping[str, np.ndarray]) -> StepRecord:
    prompts = _prompts(arrays)
    _check_completions(arrays)
    completions = completions_of(arrays, [prompts[index] for index in arrays["prompt_of"].tolist()])
    pieces = split(arrays["piece_bytes"], _lengths(arrays, "piece_lengths", "piece_bytes"))
    record = StepRecord(
        step=int(arrays["step"]),
        mini_batch=int(arrays["mini_batch"]),
        completions=completions,
        group_ids=arrays["group_ids"],
        **{name: arrays[name] for name in COLUMNS},
        pi=arrays["pi"],
        pi_old=arrays.get("pi_old"),
        expert_differences=arrays.get("expert_differences"),
        advantages_per_token=arrays.get("advantages_per_token"),
        settings=json.loads(arrays["settings"].tobytes()),
        pieces={
            token_id: piece.tobytes()
            for token_id, piece in zip(arrays["piece_ids"].tolist(), pieces, strict=True)
        },
    )
    for name in (*COLUMNS, "group_ids"):
        _check_length(name, arrays[name], len(completions))
    for name in ("pi", *OPTIONAL_PER_TOKEN):
        if name in arrays:
            _check_length(name, arrays[name], int(record.num_sampled.sum()))
    return record


def _prompts(arrays: Mapping[str, np.ndarray]) -> list[Prompt]:
    tokens = split(arrays["prompt_tokens"], _lengths(arrays, "prompt_lengths", "prompt_tokens"))
    rows = zip(
        arrays["prompt_ids"].tolist(), tokens, json.loads(arrays["prompt_info"].tobytes()), strict=True
    )
    return [
        Prompt(
            prompt_id,
            token_ids,
            answer=info["answer"],
            text=info["text"],
            metadata={SOURCE_COLUMNS[0]: info["source"]} if info["source"] else {},
        )
        for prompt_id, token_ids, info in rows
    ]


def _check_completions(arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError if lengths do not add up: `np.split` would cut anything."""
    _lengths(arrays, "completion_lengths", "completion_tokens")
    if "segment_counts" in arrays:
        _lengths(arrays, "segment_counts", "segment_lengths")
    _lengths(arrays, "span_counts", "span_versions")
    if int(arrays["span_lengths"].sum()) != len(arrays["log_probs"]):
        raise ValueError("there are not as many policy versions as log-probs")
    _check_length("pi", arrays["pi"], len(arrays["log_probs"]))


def _lengths(arrays: Mapping[str, np.ndarray], lengths: str, values: str) -> np.ndarray:
    found = arrays[lengths]
    if found.size and found.min() < 0:
        raise ValueError(f"{lengths} has a negative length")
    _check_length(values, arrays[values], int(found.sum()))
    return found


def _check_length(name: str, values: np.ndarray, expected: int) -> None:
    if values.shape != (expected,):
        raise ValueError(f"{name} has the shape {list(values.shape)}, expected [{expected}]")


def _distinct_prompts(completions: Sequence[Completion]) -> tuple[list[Prompt], np.ndarray]:
    """Return the distinct prompts and each completion's index among them, int32 [M]."""
    index: dict[tuple[int, bytes], int] = {}
    prompts, prompt_of = [], []
    for completion in completions:
        prompt = completion.prompt
        key = prompt.prompt_id, prompt.token_ids.tobytes()
        if key not in index:
            index[key] = len(prompts)
            prompts.append(prompt)
        prompt_of.append(index[key])
    return prompts, np.array(prompt_of, np.int32)


def _source(prompt: Prompt) -> str:
    found = (prompt.metadata.get(name) for name in SOURCE_COLUMNS)
    return next((name for name in found if isinstance(name, str)), "")


def _json(value: Any) -> np.ndarray:
    # a lone surrogate has no bytes in UTF-8; JSON's own escape is ASCII
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
