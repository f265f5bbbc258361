"""Recorded rollout batches come back bit by bit, or are refused with one line."""

from __future__ import annotations

import dataclasses
import math
import os

import numpy as np
import pytest

from megatron_vespo.data.rollout_file import (
    RolloutRecord,
    batch_path,
    check_record,
    read_record,
    recorded_lengths,
    write_record,
)
from megatron_vespo.types import Completion, Prompt, VersionSpans
from tests.support.builders import make_completion, make_prompt, make_segments
from tests.support.earlier_arrays import as_before

RUN = {"--group-size": 3, "number of experts": None}
LAYERS, EXPERTS = 4, 2


def completion(draw: np.random.Generator, prompt: Prompt, moe: bool) -> Completion:
    length = int(draw.integers(1, 6))
    entering = len(prompt.token_ids) + length - 1
    return Completion(
        prompt=prompt,
        token_ids=draw.integers(0, 2**31, length).astype(np.int32),
        log_probs=np.log(draw.random(length)).astype(np.float32),
        policy_versions=draw.integers(0, 9, length),
        routed_experts=draw.integers(0, 256, (entering, LAYERS, EXPERTS)).astype(np.uint8) if moe else None,
        finish_reason=str(draw.choice(["stop", "length", "abort"])),
        temperature=float(draw.random()),
        reward=float(draw.normal()),
        overlong_penalty=-float(draw.random()),
        num_retractions=int(draw.integers(0, 2)),
    )


def record(seed: int = 0, moe: bool = True) -> RolloutRecord:
    draw = np.random.default_rng(seed)
    prompts = [make_prompt(i * 7, draw.integers(0, 99, i + 1).tolist()) for i in range(4)]
    groups = [[completion(draw, prompt, moe) for _ in range(3)] for prompt in prompts]
    for retracted in (c for group in groups for c in group if c.num_retractions):
        retracted.routed_experts = None
    metrics = {"reward/mean": 0.1 + 0.2, "odd": math.nan, "huge": 5e300}
    return RolloutRecord(groups, metrics, consumed_prompts=12, run=RUN)


@pytest.fixture
def path(tmp_path):
    path = batch_path(tmp_path, 0)
    write_record(path, record())
    return path


def same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("moe", [False, True])
def test_every_bit_comes_back(tmp_path, moe):
    written = record(moe=moe)
    path = batch_path(tmp_path / "new/folder", 3)
    write_record(path, written)
    assert path.name == "batch-000003.npz"
    read = read_record(path)
    assert [len(group) for group in read.groups] == [3] * 4
    for ours, theirs in zip(sum(written.groups, []), sum(read.groups, []), strict=True):
        for field in dataclasses.fields(Completion):
            assert same(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    assert np.array_equal(list(written.metrics.values()), list(read.metrics.values()), equal_nan=True)
    assert list(read.metrics) == list(written.metrics)
    assert (read.consumed_prompts, read.run) == (12, RUN)


def conversation(prompt: Prompt, **fields) -> Completion:
    """Two sampled tokens, three given, one sampled, one given."""
    return make_completion(
        prompt,
        [5, 6, 7, 8, 9, 10, 11],
        [3, 3, 4],
        log_probs=np.array([-0.1, -0.2, -0.3], np.float32),
        segments=make_segments(2, 3, 1, 1),
        reward=0.1,
        **fields,
    )


EXTRAS = {
    "turn_rewards": (0.1 + 0.2, -1e-300),
    "environment_error": "it said: “no”\n",
    "reward_data": {"tool_calls": 3, "nested": [{"a": None}, 0.1], "text": "\udc80 é"},
    "reward_parts": {"accuracy": 1 / 3, "format": math.inf},
}


@pytest.mark.parametrize("chosen", [[], *([name] for name in EXTRAS), list(EXTRAS)])
def test_what_conversations_have_comes_back(tmp_path, chosen):
    prompts = [make_prompt(i, [1] * (i + 2)) for i in range(2)]
    extras = {name: EXTRAS[name] for name in chosen}
    routed = {"routed_experts": np.arange(8 * 4, dtype=np.uint8).reshape(8, 2, 2)}
    groups = [
        [conversation(prompts[0], **extras, **routed), make_completion(prompts[0], 3, reward=0.0)],
        [make_completion(prompts[1], 0, reward=0.0), conversation(prompts[1])],
    ]
    path = batch_path(tmp_path, 0)
    write_record(path, RolloutRecord(groups, {}, 2, RUN))
    for ours, theirs in zip(sum(groups, []), sum(read_record(path).groups, []), strict=True):
        for field in dataclasses.fields(Completion):
            assert same(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    prompt_tokens, response_tokens = recorded_lengths(tmp_path)
    assert (prompt_tokens.tolist(), response_tokens.tolist()) == ([2, 3], [[7, 3], [0, 7]])


def test_files_without_given_tokens_have_nothing_of_them(path):
    with np.load(path) as stored:
        assert not {"segment_counts", "segment_writers", "segment_lengths", "extras"} & set(stored.files)


def test_a_given_token_costs_a_record_its_id_alone(tmp_path):
    prompt = make_prompt(0)
    sizes = []
    for given in (1, 1001):
        path = batch_path(tmp_path, given)
        one = make_completion(prompt, given + 2, segments=make_segments(1, given, 1), reward=0.0)
        assert one.policy_versions == VersionSpans((0,), (2,))
        write_record(path, RolloutRecord([[one]], {}, 1, RUN))
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] == 4 * 1000


@pytest.mark.parametrize("moe", [False, True])
def test_records_of_earlier_versions_are_read(tmp_path, moe):
    path = batch_path(tmp_path, 0)
    write_record(path, record(moe=moe))
    expected = read_record(path)
    with np.load(path) as stored:
        arrays = as_before(dict(stored))
    np.savez(path, **arrays | {"prompt_tokens": arrays["prompt_tokens"].astype(np.int64)})
    read = read_record(path)
    for ours, theirs in zip(sum(expected.groups, []), sum(read.groups, []), strict=True):
        for field in dataclasses.fields(Completion):
            assert same(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def test_a_kill_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, record(1))
    assert path.read_bytes() == before


def test_no_pickle_is_written_or_loaded(path):
    with np.load(path, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)
    np.savez(path, run=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match="not a recorded rollout batch: Object arrays cannot be loaded"):
        read_record(path)


def test_what_is_no_record_is_named(path):
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        for read in (read_record, lambda path: check_record(path, RUN)):
            with pytest.raises(ValueError) as error:
                read(path)
            assert str(error.value).startswith(f"{path}: not a recorded rollout batch: ")
            assert "\n" not in str(error.value)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="not a recorded rollout batch"):
        check_record(path, RUN)
    with pytest.raises(ValueError, match="no such file"):
        read_record(path.with_name("none.npz"))


def test_who_needs_routes_is_told_that_there_are_none(path):
    check_record(path, RUN, needs_routes=True)  # engines have lost some
    write_record(path, record(moe=False))
    check_record(path, RUN)
    with pytest.raises(ValueError, match="^.*npz has no routes, which --routing-replay R3 replays: [^\\n]*$"):
        check_record(path, RUN, needs_routes=True)


def test_another_run_is_named(path):
    with pytest.raises(ValueError) as error:
        check_record(path, RUN | {"--group-size": 4})
    assert str(error.value) == f"{path} was recorded with --group-size 3, this run has 4"


def test_scores_of_teachers_come_back(tmp_path):
    """Of the tokens that the policy sampled; a completion that waits for its score has none."""
    prompt = make_prompt(0, [1, 2])
    scores = np.array([-0.5, -1e-30, -7.0], np.float32)
    group = [conversation(prompt, teacher_log_probs=scores), make_completion(prompt, 4, reward=0.0)]
    write_record(batch_path(tmp_path, 0), RolloutRecord([group], {}, 1, RUN))
    [read] = read_record(batch_path(tmp_path, 0)).groups
    assert same(read[0].teacher_log_probs, scores) and read[1].teacher_log_probs is None
    with pytest.raises(ValueError, match=r"batch-000000\.npz has no log-probs of a teacher"):
        check_record(batch_path(tmp_path, 0), RUN, needs_teacher=True)
    group[1].teacher_log_probs = np.zeros(4, np.float32)
    write_record(batch_path(tmp_path, 0), RolloutRecord([group], {}, 1, RUN))
    check_record(batch_path(tmp_path, 0), RUN, needs_teacher=True)


def test_a_check_reads_no_large_array(path, monkeypatch):
    """A run on many recorded batches checks all of them before it starts."""
    read, get = [], np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda file, name: read.append(name) or get(file, name)
    )
    with pytest.raises(ValueError, match="has no log-probs of a teacher"):
        check_record(path, RUN, needs_routes=True, needs_teacher=True)
    check_record(path, RUN, needs_routes=True)
    assert set(read) <= {"run", "routed", "num_retractions"}


def test_who_needs_a_teacher_is_told_that_there_was_none(path):
    with pytest.raises(ValueError, match="has no log-probs of a teacher"):
        check_record(path, RUN, needs_teacher=True)
    with np.load(path) as stored:
        assert not {"teacher_scored", "teacher_log_probs"} & set(stored.files)
