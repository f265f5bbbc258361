"""Writes records of --record-responses that look like a run's, for tests and benchmarks of what reads them.

Example:
    write_steps(folder, num_steps=8, groups=4, group_size=4)     # folder/step-000001.npz ... step-000008.npz
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vespo.data.step_records import StepRecord, record_path, write_step
from megatron_vespo.types import Completion, Prompt, Segments, VersionSpans

SETTINGS = {
    "policy_loss": "vespo",
    "ratio_denominator": "rollout",
    "vespo_positive": [2.0, 3.0],
    "vespo_negative": [3.0, 2.0],
    "clip_range": None,
    "steps_per_rollout": 4,
    "clip_bounds": None,
}
_LETTERS = string.printable.encode()
# token -> bytes: characters, words, and two halves of a letter
WORDS = ("the", " answer", " is", " boxed", "so", " we", " add", " carry", "\n\n", " 7", "<b>&amp;", "\u00e9")
PIECES = dict(enumerate([bytes([b]) for b in _LETTERS] + [w.encode() for w in WORDS] + [b"\xc3", b"\xa9"]))


@dataclass(frozen=True)
class StepShape:
    """What a random step looks like; lengths are in tokens."""

    groups: int = 4
    group_size: int = 4
    mean_length: int = 40
    max_length: int = 400
    turns: bool = True  # every third response is a conversation with a tool
    with_old: bool = True
    with_experts: bool = False
    with_advantages: bool = False  # per token


def random_step(step: int, shape: StepShape | None = None, seed: int = 0) -> StepRecord:
    """Return a record whose log W is that of its tokens: the sum of pi - log mu."""
    shape, draw = shape or StepShape(), np.random.default_rng([seed, step])
    completions, group_ids = [], []
    for group in range(shape.groups):
        prompt = _prompt(draw, (step - 1) * shape.groups + group)
        for _ in range(shape.group_size):
            completions.append(_completion(draw, prompt, step, shape, len(completions)))
            group_ids.append(group)
    lengths = np.array([one.num_sampled for one in completions])
    mu = np.concatenate([one.log_probs for one in completions])
    staleness = draw.normal(0.0, 0.02, len(mu)).astype(np.float32)
    mismatch = draw.normal(0.0, 0.004, len(mu)).astype(np.float32)
    pi_old = np.minimum(mu + mismatch, 0.0).astype(np.float32)
    pi = np.minimum(pi_old + staleness, 0.0).astype(np.float32)
    rewards = np.array([one.reward for one in completions]).reshape(shape.groups, -1)
    advantages = (rewards - rewards.mean(1, keepdims=True)).ravel()
    log_w = _sums(pi.astype(np.float64) - mu, lengths)
    log_mismatch = _sums(pi_old.astype(np.float64) - mu, lengths)
    return StepRecord(
        step=step,
        mini_batch=(step - 1) % 4,
        completions=completions,
        group_ids=np.array(group_ids, np.int64),
        advantages=advantages.astype(np.float32),
        log_w=log_w,
        weight=phi(log_w, advantages),
        correction=np.ones_like(log_w),
        rejected=np.zeros_like(log_w),
        log_mismatch_in_w=log_mismatch,
        log_mismatch=log_mismatch,
        pi=pi,
        pi_old=pi_old if shape.with_old else None,
        expert_differences=draw.poisson(0.3, len(mu)).astype(np.uint8) if shape.with_experts else None,
        advantages_per_token=_per_token(draw, advantages, lengths) if shape.with_advantages else None,
        settings=SETTINGS | {"has_advantages_per_token": shape.with_advantages},
        pieces=PIECES,
    )


def write_steps(folder: Path, num_steps: int, seed: int = 0, **shape: int | bool) -> list[Path]:
    """Write steps 1 to `num_steps`; `shape` has fields of StepShape."""
    paths = [record_path(folder, step) for step in range(1, num_steps + 1)]
    for step, path in enumerate(paths, start=1):
        write_step(path, random_step(step, StepShape(**shape), seed))
    return paths


def log_w_of_tokens(record: StepRecord) -> np.ndarray:
    """Return log W of every sample as the sum over its tokens, in float64; [M]."""
    denominator = record.settings["ratio_denominator"]
    if denominator == "rollout":
        below = np.concatenate([one.log_probs for one in record.completions])
    else:
        assert record.pi_old is not None
        below = record.pi_old
    sums = [one.sum() for one in record.per_sample(record.pi.astype(np.float64) - below)]
    # the truncated part of the mismatch is one of the response, not of tokens
    in_w = record.log_mismatch_in_w if denominator.startswith("decoupled") else 0.0
    return np.array(sums) + in_w


def phi(log_w: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """Return W^c1 exp(c2 (1 - W)) with the constants of SETTINGS, float32 [M]."""
    positive = advantages >= 0
    c1 = np.where(positive, SETTINGS["vespo_positive"][0], SETTINGS["vespo_negative"][0])
    c2 = np.where(positive, SETTINGS["vespo_positive"][1], SETTINGS["vespo_negative"][1])
    return np.exp(c1 * log_w + c2 * (1.0 - np.exp(log_w.astype(np.float64)))).astype(np.float32)


def _per_token(draw: np.random.Generator, advantages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return (np.repeat(advantages, lengths) + draw.normal(0.0, 0.5, lengths.sum())).astype(np.float32)


def _prompt(draw: np.random.Generator, number: int) -> Prompt:
    text = f"What is {number} + {number % 7}?"
    return Prompt(
        number,
        np.frombuffer(text.encode(), np.uint8).astype(np.int32) % 100,
        answer=str(number + number % 7),
        text=text,
        metadata={"data_source": str(draw.choice(["sums", "products"]))},
    )


def _completion(
    draw: np.random.Generator, prompt: Prompt, step: int, shape: StepShape, number: int
) -> Completion:
    length = int(np.clip(draw.geometric(1.0 / shape.mean_length), 3, shape.max_length))
    segments = None
    if shape.turns and number % 3 == 2:
        given = max(1, length // 4)
        before = int(draw.integers(1, length - given))
        parts = (("policy", before), ("tool", given), ("policy", length - given - before))
        segments = Segments.joined(Segments.single(writer, n) for writer, n in parts)
    sampled = length if segments is None else segments.num_sampled
    cut = int(draw.integers(0, sampled + 1))
    newest = max(0, step - 1)
    versions = [VersionSpans.single(max(0, newest - 2), cut), VersionSpans.single(newest, sampled - cut)]
    right = bool(draw.random() < 0.4)
    return Completion(
        prompt=prompt,
        token_ids=draw.integers(0, len(PIECES), length).astype(np.int32),
        log_probs=-draw.exponential(0.5, sampled).astype(np.float32),
        policy_versions=VersionSpans.joined(versions),
        routed_experts=None,
        finish_reason="length" if length == shape.max_length else "stop",
        temperature=1.0,
        reward=float(right),
        reward_parts={"right": float(right), "form": float(draw.random() < 0.8)},
        segments=segments,
    )


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.array([part.sum() for part in np.split(values, np.cumsum(lengths)[:-1])], np.float32)
