"""Returns one recorded response token by token: its text, log W as it grew, and the parts of each ratio.

C tokens after the prompt, N of them sampled. Arrays of the answer are lists of N numbers in the order of the
sampled tokens; null stands for unknown.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_vespo.commands.view.index import source_of
from megatron_vespo.commands.view.kernel import Kernel, thresholds
from megatron_vespo.data.step_records import StepRecord
from megatron_vespo.types import Completion

DIGITS = 6  # after the point; float32 log-probs have about as many
THINK, END_OF_THINK = "<think>", "</think>"
DEFAULT_DENOMINATOR, DEFAULT_TRUNCATION = "recomputed", 2.0  # of LossSettings


@dataclass(frozen=True)
class Ratios:
    """log(pi / mu) of one response's sampled tokens and its parts, float64 [N]; None: pi_old is unknown."""

    total: np.ndarray  # log pi - log mu
    staleness: np.ndarray | None  # log pi - log pi_old
    mismatch: np.ndarray | None  # log pi_old - log mu

    @classmethod
    def of(cls, pi: np.ndarray, pi_old: np.ndarray | None, mu: np.ndarray) -> Ratios:
        pi, mu = pi.astype(np.float64), mu.astype(np.float64)
        if pi_old is None:
            return cls(pi - mu, None, None)
        pi_old = pi_old.astype(np.float64)
        return cls(pi - mu, pi - pi_old, pi_old - mu)

    def running_log_w(self, settings: Mapping[str, Any]) -> np.ndarray:
        """log W of the first t tokens for t = 1 .. N, as `sequence_log_ratio` defines it.

        ValueError if the denominator needs pi_old, and the record has none.
        """
        denominator = settings.get("ratio_denominator", DEFAULT_DENOMINATOR)
        if denominator == "rollout":
            return np.cumsum(self.total)
        if self.staleness is None or self.mismatch is None:
            raise ValueError(f"the ratio denominator {denominator} needs pi_old, which was not recorded")
        most = math.log(float(settings.get("mismatch_truncation", DEFAULT_TRUNCATION)))
        if denominator == "decoupled":
            return np.cumsum(self.staleness) + np.minimum(np.cumsum(self.mismatch), most)
        if denominator == "decoupled-token":
            return np.cumsum(self.staleness + np.minimum(self.mismatch, most))
        return np.cumsum(self.staleness)


def response_detail(record: StepRecord, index: int) -> dict[str, Any]:
    """Return everything about sample `index` of a record. IndexError if there is none."""
    if not 0 <= index < len(record.completions):
        raise IndexError(f"step {record.step} has {len(record.completions)} responses, no number {index}")
    completion, log_w = record.completions[index], float(record.log_w[index])
    start = int(record.num_sampled[:index].sum())
    sampled = slice(start, start + int(record.num_sampled[index]))
    pi, mu = record.pi[sampled], np.asarray(completion.log_probs)
    pi_old = None if record.pi_old is None else record.pi_old[sampled]
    ratios = Ratios.of(pi, pi_old, mu)
    pieces = token_texts([record.pieces.get(token_id) for token_id in completion.token_ids.tolist()])
    differences = record.expert_differences
    return _numbers(record, index, completion) | {
        "prompt": {
            "text": completion.prompt.text,
            "tokens": record.text(completion.prompt.token_ids),
            "answer": completion.prompt.answer,
            "length": len(completion.prompt.token_ids),
        },
        "settings": dict(record.settings),
        "token_ids": completion.token_ids.tolist(),
        "pieces": pieces,
        "blocks": blocks(completion, pieces),
        "versions": spans(completion),
        "log_pi": _list(pi),
        "log_pi_old": _list(pi_old),
        "log_mu": _list(mu),
        "total": _list(ratios.total),
        "staleness_per_token": _list(ratios.staleness),
        "mismatch_per_token": _list(ratios.mismatch),
        "expert_differences": None if differences is None else differences[sampled].tolist(),
        "advantages_per_token": _list(_token_advantages(record, sampled)),
        "running": _running(ratios, record, index, log_w, _token_advantages(record, sampled)),
    }


def _numbers(record: StepRecord, index: int, completion: Completion) -> dict[str, Any]:
    def value(column: np.ndarray) -> float | None:
        return _finite(float(column[index]))

    versions = completion.policy_versions
    length = completion.num_sampled
    return {
        "step": record.step,
        "index": index,
        "responses": len(record.completions),  # of the optimizer step
        "group": int(record.group_ids[index]),
        "mini_batch": record.mini_batch,
        "prompt_id": completion.prompt.prompt_id,
        "source": source_of(completion),
        "reward": _finite(completion.reward),
        "overlong_penalty": completion.overlong_penalty,
        "reward_parts": {name: _finite(part) for name, part in completion.reward_parts.items()},
        "turn_rewards": [_finite(reward) for reward in completion.turn_rewards],
        "reward_data": completion.reward_data,
        "environment_error": completion.environment_error,
        "status": completion.reward_status,
        "finish": completion.finish_reason,
        "temperature": completion.temperature,
        "num_retractions": completion.num_retractions,
        "length": length,
        "given": len(completion.token_ids) - length,
        "lag": record.step - 1 - versions.oldest if len(versions) else None,
        "advantage": value(record.advantages),
        "log_w": value(record.log_w),
        "weight": value(record.weight),
        "correction": value(record.correction),
        "rejected": value(record.rejected),
        "mismatch_in_w": value(record.log_mismatch_in_w),
        "staleness_in_w": value(record.log_w - record.log_mismatch_in_w),
        "mismatch": value(record.log_mismatch),
    }


def _token_advantages(record: StepRecord, sampled: slice) -> np.ndarray | None:
    return None if record.advantages_per_token is None else record.advantages_per_token[sampled]


def _running(
    ratios: Ratios, record: StepRecord, index: int, log_w: float, token_advantages: np.ndarray | None
) -> dict[str, Any]:
    """Return log W and phi(W) after each token, phi's landmarks, and each token's share of log W.

    The landmarks are those of the response's A. phi of a token is by its own A, if it has one.
    """
    advantage = float(record.advantages[index])
    kernel = Kernel.of(record.settings)
    c1, c2 = kernel.constants(advantage)
    common = {"c1": c1, "c2": c2, "thresholds": asdict(thresholds(c1, c2)), "loss": kernel.loss}
    try:
        running = ratios.running_log_w(record.settings)
    except ValueError as unknown:
        return common | {"log_w": None, "phi": None, "own": None, "why_not": str(unknown), "difference": None}
    argument = kernel.scaled(running, np.arange(1, len(running) + 1))
    phi = kernel.phi(
        argument, np.full(len(running), advantage) if token_advantages is None else token_advantages
    )
    end = float(running[-1]) if len(running) else 0.0
    return common | {
        "log_w": _list(running),
        "phi": _list(phi),
        "own": _list(np.diff(running, prepend=0.0)),  # what the token adds to log W
        "why_not": "",
        "difference": _finite(end - log_w),  # of the sum's end and the trainer's log W
    }


def token_texts(pieces: Sequence[bytes | None]) -> list[str | None]:
    """Return each token's text; a letter of several tokens belongs to the last of them.

    "" stands for a token that only begins a letter, None for one whose bytes are not recorded.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [None if piece is None else decoder.decode(piece) for piece in pieces]


def blocks(completion: Completion, pieces: Sequence[str | None]) -> list[dict[str, Any]]:
    """Return the response's turns as token ranges: {"writer", "thinking", "start", "end", "sampled_before"}.

    `sampled_before` is the number of sampled tokens before the block: where its numbers begin. A policy's
    turn is cut where <think> begins and </think> ends; without <think>, thinking began in the prompt.
    """
    segments = completion.segments
    turns = segments.spans() if segments is not None else [("policy", len(completion.token_ids))]
    found, start, sampled = [], 0, 0
    for writer, length in turns:
        parts = [(False, start, start + length)]
        if writer == "policy":
            parts = _thinking_parts(pieces, start, start + length)
        for thinking, first, end in parts:
            place = {"start": first, "end": end, "sampled_before": sampled}
            found.append({"writer": writer, "thinking": thinking} | place)
            sampled += end - first if writer == "policy" else 0
        start += length
    return found


def _thinking_parts(pieces: Sequence[str | None], start: int, end: int) -> list[tuple[bool, int, int]]:
    """Cut a turn into (thinking or not, first token, token after the last)."""
    texts = [piece or "" for piece in pieces[start:end]]
    text, ends = "".join(texts), np.cumsum([len(one) for one in texts])
    opened, closed = text.find(THINK), text.find(END_OF_THINK)
    if opened < 0 and closed < 0:
        return [(False, start, end)]
    first = start if opened < 0 else start + int(np.searchsorted(ends, opened, "right"))
    after = end
    if closed >= 0:
        after = start + int(np.searchsorted(ends, closed + len(END_OF_THINK), "left")) + 1
    parts = [(False, start, first), (True, first, after), (False, after, end)]
    return [part for part in parts if part[2] > part[1]]


def spans(completion: Completion) -> list[list[int]]:
    """Return [policy version, number of sampled tokens] of each span."""
    versions = completion.policy_versions
    return [list(span) for span in zip(versions.versions, versions.lengths, strict=True)]


def _list(values: np.ndarray | None) -> list[float | None] | None:
    if values is None:
        return None
    rounded = np.round(np.asarray(values, np.float64), DIGITS)
    if np.isfinite(rounded).all():
        return rounded.tolist()
    return [value if math.isfinite(value) else None for value in rounded.tolist()]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
