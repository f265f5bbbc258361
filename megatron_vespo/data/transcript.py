"""Reads the text of responses: who wrote which part of it, and which tools it calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_vespo.types import Completion, Writer


class Turn(NamedTuple):
    """What one writer wrote in a row, without special tokens."""

    writer: Writer
    text: str


def transcripts(tokenizer: Any, completions: Sequence[Completion]) -> list[list[Turn]]:
    """Return the turns of each completion. A response without segments is one turn of the policy."""
    writers, tokens = [], []
    for completion in completions:
        spans = _spans(completion)
        writers.append([writer for writer, _ in spans])
        tokens += [token_ids for _, token_ids in spans]
    texts = iter(tokenizer.batch_decode(tokens, skip_special_tokens=True))
    return [[Turn(writer, next(texts)) for writer in of_one] for of_one in writers]


def answer_text(turns: Sequence[Turn]) -> str:
    """Return what the policy wrote in its last turn: what earns a reward. No tool's output is in it."""
    return next((turn.text for turn in reversed(turns) if turn.writer == "policy"), "")


def _spans(completion: Completion) -> list[tuple[Writer, np.ndarray]]:
    """Return the tokens of each segment, int32 [n], with their writer."""
    segments, token_ids = completion.segments, completion.token_ids
    if segments is None or not segments.writers:
        return [("policy", token_ids)]
    parts = np.split(token_ids, np.cumsum(segments.lengths)[:-1])
    return list(zip(segments.writers, parts, strict=True))
