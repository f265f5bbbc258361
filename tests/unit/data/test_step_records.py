"""Records of --record-responses come back bit by bit; damaged files are refused with one line."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from megatron_vespo.data.step_records import (
    COLUMNS,
    OPTIONAL_PER_TOKEN,
    StepRecord,
    read_step,
    record_path,
    step_files,
    write_step,
)
from tests.support.builders import make_completion, make_prompt, make_segments
from tests.support.step_records import PIECES, StepShape, random_step, write_steps


def same(one: StepRecord, other: StepRecord) -> None:
    for name in (*COLUMNS, "group_ids", "pi", *OPTIONAL_PER_TOKEN):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype, name
            assert ours.tobytes() == theirs.tobytes(), name  # also NaN
    assert (one.step, one.mini_batch, dict(one.pieces), one.settings) == (
        other.step, other.mini_batch, dict(other.pieces), other.settings,
    )  # fmt: skip
    for ours, theirs in zip(one.completions, other.completions, strict=True):
        values, others = ({f.name: getattr(c, f.name) for f in dataclasses.fields(c)} for c in (ours, theirs))
        for name in ("token_ids", "log_probs"):
            assert values.pop(name).tobytes() == others.pop(name).tobytes()
        assert values == others


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("with_experts", [True, False])
@pytest.mark.parametrize("with_advantages", [True, False])
def test_a_record_comes_back(tmp_path, with_old, with_experts, with_advantages):
    shape = StepShape(with_old=with_old, with_experts=with_experts, with_advantages=with_advantages)
    record = random_step(12, shape)
    assert (record.advantages_per_token is not None) == with_advantages
    path = record_path(tmp_path, 12)
    size = write_step(path, record)
    assert size == path.stat().st_size
    same(record, read_step(path))


def test_odd_values_come_back(tmp_path):
    prompt = make_prompt(3, [1, 2], text="\ud800 <b>", answer="\n")
    completions = [
        make_completion(prompt, 0, reward=None),
        make_completion(prompt, 4, segments=make_segments(2, 2), reward=math.inf, environment_error="gone"),
    ]
    column = np.array([math.nan, -math.inf], np.float32)
    record = StepRecord(
        1, 0, completions, np.array([0, 0]), *[column] * len(COLUMNS), pi=np.array([-0.5, -0.0], np.float32)
    )
    path = record_path(tmp_path, 1)
    write_step(path, record)
    back = read_step(path)
    same(record, back)
    assert back.completions[0].prompt is back.completions[1].prompt
    assert [len(one) for one in back.per_sample(back.pi)] == [0, 2]


def test_routes_are_not_written(tmp_path):
    record = random_step(1)
    for one in record.completions:
        one.routed_experts = np.zeros((5, 2, 2), np.uint8)
    write_step(record_path(tmp_path, 1), record)
    assert all(one.routed_experts is None for one in read_step(record_path(tmp_path, 1)).completions)


def test_nothing_is_stored_twice(tmp_path):
    shape = StepShape(groups=2, group_size=16, mean_length=500, max_length=600, with_old=False, turns=False)
    record = random_step(1, shape)
    tokens = sum(len(one.token_ids) for one in record.completions)
    size = write_step(record_path(tmp_path, 1), record)
    # tokens, log mu and log pi take 12 bytes per token
    assert 12 * tokens < size < 12 * tokens + 40_000


def test_text_of_tokens():
    record = random_step(1)
    whole = np.array([len(PIECES) - 2, len(PIECES) - 1])
    assert record.text(whole) == "\u00e9"
    assert record.text(whole[:1]) == "\ufffd"


def test_files_are_listed_by_step(tmp_path):
    write_steps(tmp_path, 2)
    write_step(record_path(tmp_path, 1_234_567), random_step(1_234_567))
    for name in (".step-000003.npz.17.partial", "step-3.npz", "batch-000001.npz"):
        (tmp_path / name).touch()
    names = {1: "step-000001.npz", 2: "step-000002.npz", 1_234_567: "step-1234567.npz"}
    assert step_files(tmp_path) == [(step, tmp_path / name) for step, name in names.items()]
    assert step_files(tmp_path / "missing") == []


def refused(path) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]*--record-responses[^\n]*\Z") as caught:
        read_step(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_and_foreign_files_are_refused(tmp_path):
    path = record_path(tmp_path, 1)
    assert "no such file" in refused(path)
    for content in (b"", b"PK", b"garbage\n\n" * 9, b"PK\x03\x04" + bytes(200)):
        path.write_bytes(content)
        assert "pickle" not in refused(path)  # numpy's advice to load it is bad advice
    path.unlink()
    path.mkdir()
    refused(path)


def test_every_truncation_is_refused(tmp_path):
    [path] = write_steps(tmp_path, 1)
    content = path.read_bytes()
    for end in np.linspace(0, len(content) - 1, 200).astype(int):
        path.write_bytes(content[:end])
        refused(path)


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    [path] = write_steps(tmp_path, 1)
    content, original = path.read_bytes(), read_step(path)
    draw, accepted = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.integers(len(damaged))] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        try:
            back = read_step(path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:  # in a field of the archive that nobody reads
            same(original, back)
            accepted += 1
    assert accepted < 100


def rewritten(path, **changes) -> None:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pi", lambda v: v[1:]),
        ("log_w", lambda v: v[1:]),
        ("pi_old", lambda v: v[None]),
        ("group_ids", lambda v: v[1:]),
        ("completion_lengths", lambda v: v - 1),
        ("completion_lengths", lambda v: -v),
        ("prompt_of", lambda v: v + 100),
        ("prompt_lengths", lambda v: v + 1),
        ("segment_lengths", lambda v: v[1:]),
        ("span_lengths", lambda v: v + 1),
        ("piece_lengths", lambda v: v + 1),
        ("prompt_info", lambda v: np.frombuffer(json.dumps([7]).encode(), np.uint8)),
        ("settings", lambda v: v[:3]),
        ("extras", lambda v: v[:3]),
        ("weight", lambda v: None),
        ("log_probs", lambda v: None),
        ("mini_batch", lambda v: np.array([1, 2])),
    ],
)
def test_lengths_that_do_not_add_up_are_refused(tmp_path, name, change):
    [path] = write_steps(tmp_path, 1)
    with np.load(path) as stored:
        rewritten(path, **{name: change(stored[name])})
    refused(path)


def test_an_array_of_objects_is_refused(tmp_path):
    [path] = write_steps(tmp_path, 1)
    rewritten(path, settings=np.array({"a": 1}, dtype=object))
    assert "pickle" in refused(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    [path] = write_steps(tmp_path, 1)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_step(path, dataclasses.replace(random_step(1), settings={"a": object()}))
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_reading_needs_no_heavy_package():
    code = (
        "import sys, megatron_vespo.data.step_records\n"
        "print(sorted({'torch', 'ray', 'sglang', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
