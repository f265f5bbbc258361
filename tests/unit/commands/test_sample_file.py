"""Files of samples: what a line may hold, and what is said about a wrong one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_vespo.commands.check_layout.sample_file import random_samples, read_samples, with_noisy_behavior
from megatron_vespo.types import Segments, VersionSpans

VOCAB_SIZE = 20
ROW = {"token_ids": [5, 9, 2, 11, 19], "prompt_length": 3, "advantage": -0.25}


@pytest.fixture()
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "samples.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def test_a_line_becomes_a_sample(write):
    full = {
        "behavior_log_probs": [-1, -0.5],
        "token_advantages": [0.5, -2],
        "temperature": 0.7,
        "reward": 1.0,
        "group_id": 4,
    }
    first, second = read_samples(write(ROW, "", ROW | full), VOCAB_SIZE)

    np.testing.assert_array_equal(first.token_ids, [5, 9, 2, 11, 19])
    assert first.token_ids.dtype == np.int32
    assert (first.prompt_length, first.completion_length, first.advantage) == (3, 2, -0.25)
    assert (first.temperature, first.reward, first.group_id) == (1.0, 0.0, 0)
    assert np.isnan(first.behavior_log_probs).all() and first.behavior_log_probs.shape == (2,)
    assert first.policy_versions == VersionSpans((0,), (2,)) and first.token_advantages is None

    np.testing.assert_array_equal(second.behavior_log_probs, np.array([-1.0, -0.5], np.float32))
    assert second.behavior_log_probs.dtype == np.float32
    np.testing.assert_array_equal(second.token_advantages, np.array([0.5, -2.0], np.float32), strict=True)
    assert (second.temperature, second.reward, second.group_id) == (0.7, 1.0, 4)


def test_supports_are_lists_of_ids(write):
    [sample] = read_samples(write(ROW | {"supports": [[3, 11], [19]]}), VOCAB_SIZE)
    assert sample.supports.counts.tolist() == [2, 1]
    assert sample.supports.token_ids.tolist() == [3, 11, 19]
    assert sample.supports.counts.dtype == sample.supports.token_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", "a row must be a JSON object, this one is a list"),
        ({"token_ids": [1, 2], "prompt_length": 1}, "advantage is missing"),
        (ROW | {"behaviour_log_probs": [-1, -1]},
         "no key 'behaviour_log_probs' is known; did you mean 'behavior_log_probs'?"),
        (ROW | {"zzz": 1}, "no key 'zzz' is known; known are token_ids, prompt_length, advantage, "
                           "behavior_log_probs, token_advantages, temperature, reward, group_id, segments, "
                           "supports"),
        (ROW | {"supports": [11, 19]},
         "supports must be lists of integers from 0 to 19, one list per sampled token, for example "),
        (ROW | {"supports": [[11], [20]]}, "supports must be lists of integers from 0 to 19"),
        (ROW | {"supports": [[11]]}, "the sample has supports of 1 tokens for 2 sampled tokens"),
        (ROW | {"supports": [[11], [1, 2]]},
         "the sample has the token 19 at sampled token 1, whose support does not include it"),
        (ROW | {"token_ids": [5, 20]}, "token_ids must be a list of integers from 0 to 19"),
        (ROW | {"token_ids": [5, -1]}, "token_ids must be a list of integers from 0 to 19"),
        (ROW | {"token_ids": [5, 1.0]}, "token_ids must be a list of integers from 0 to 19"),
        (ROW | {"token_ids": "5 9"}, "token_ids must be a list of integers from 0 to 19"),
        (ROW | {"prompt_length": 0}, "prompt_length must be an integer from 1 to 4, one less than the "
                                     "token_ids, it is the number 0"),
        (ROW | {"prompt_length": 5}, "prompt_length must be an integer from 1 to 4"),
        (ROW | {"prompt_length": True}, "prompt_length must be an integer from 1 to 4"),
        (ROW | {"advantage": None}, "advantage must be a finite number, here is null"),
        ('{"token_ids": [1, 2], "prompt_length": 1, "advantage": NaN}',
         "advantage must be a finite number, here is the number nan"),
        (ROW | {"temperature": 0}, "temperature must be positive, it is the number 0"),
        (ROW | {"group_id": 1.5}, "group_id must be an integer, it is the number 1.5"),
        (ROW | {"behavior_log_probs": [-1]},
         "behavior_log_probs must be a list of 2 numbers, one per sampled token, it is a list of 1"),
        (ROW | {"token_advantages": [1, 2, 3]},
         "token_advantages must be a list of 2 numbers, one per sampled token, it is a list of 3"),
        (ROW | {"token_advantages": [1, None]}, "token_advantages must be a finite number, here is null"),
        (ROW | {"behavior_log_probs": None},
         "behavior_log_probs must be a list of 2 numbers, one per sampled token, it is null"),
        (ROW | {"behavior_log_probs": [-1, "x"]},
         "behavior_log_probs must be a finite number, here is a string"),
        (ROW | {"segments": {"policy": 2}}, "segments must be a list of pairs of a writer and its number of "
                                            'tokens, for example [["policy", 12], ["tool", 5]]'),
        (ROW | {"segments": [["policy", 1], "tool"]}, "segments must be a list of pairs of a writer"),
        (ROW | {"segments": [["policy", 1], ["user", 1]]},
         "a writer of segments is one of policy, environment, tool, not 'user'"),
        (ROW | {"segments": [["policy", 2], ["tool", 0]]},
         "the tokens of a segment must be an integer from 1, here is the number 0"),
        (ROW | {"segments": [["policy", True], ["tool", 1]]},
         "the tokens of a segment must be an integer from 1"),
        (ROW | {"segments": [["policy", 1]]}, "segments have 1 tokens, token_ids has 2 after the prompt"),
        (ROW | {"segments": [["tool", 2]]},
         "no token of segments is the policy's: there is nothing to train on"),
        (ROW | {"segments": [["policy", 1], ["tool", 1]], "behavior_log_probs": [-1, -1]},
         "behavior_log_probs must be a list of 1 numbers, one per sampled token, it is a list of 2"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(write, row, message):
    path = write(ROW, row)
    with pytest.raises(ValueError) as raised:
        read_samples(path, VOCAB_SIZE)
    assert str(raised.value).startswith(f"{path} line 2: {message}")
    assert "\n" not in str(raised.value)


def test_a_file_without_samples(write, tmp_path):
    with pytest.raises(ValueError, match="the file is empty; it needs one sample a line"):
        read_samples(write(""), VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"none.jsonl: no such file"):
        read_samples(tmp_path / "none.jsonl", VOCAB_SIZE)


def test_random_samples_depend_on_the_seed_alone():
    one, again, other = (random_samples(64, VOCAB_SIZE, 4, 6, seed) for seed in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert (a.prompt_length, a.advantage) == (b.prompt_length, b.advantage)
    assert [s.advantage for s in one] != [s.advantage for s in other]


def test_random_samples_cover_their_ranges():
    samples = random_samples(400, VOCAB_SIZE, 4, 6, seed=0)
    assert {s.prompt_length for s in samples} == {1, 2, 3, 4}
    assert {s.completion_length for s in samples} == {1, 2, 3, 4, 5, 6}
    assert set(np.concatenate([s.token_ids for s in samples])) == set(range(VOCAB_SIZE))
    assert {s.advantage > 0 for s in samples} == {True, False}
    assert {s.temperature for s in samples} == {1.0}


def test_some_random_samples_have_given_tokens_between_sampled_ones():
    samples = random_samples(90, VOCAB_SIZE, 4, 6, seed=0)
    given = [s for s in samples if s.segments is not None]
    assert 15 <= len(given) <= 30
    for s in given:
        assert s.segments.writers == ("policy", "environment", "policy")
        assert len(s.segments) == s.completion_length
        assert len(s.behavior_log_probs) == len(s.policy_versions) == s.num_trained < s.completion_length


def test_segments_say_which_tokens_the_policy_sampled(write):
    row = ROW | {"prompt_length": 1, "behavior_log_probs": [-1, -2]}
    row["segments"] = [["policy", 1], ["tool", 1], ["tool", 1], ["policy", 1]]
    [sample] = read_samples(write(row), VOCAB_SIZE)
    assert sample.segments == Segments(("policy", "tool", "policy"), (1, 2, 1))
    assert sample.behavior_log_probs.tolist() == [-1.0, -2.0]
    assert sample.policy_versions == VersionSpans((0,), (2,))


def test_only_missing_behavior_is_made(write):
    given = {"behavior_log_probs": [-3.0, -4.0]}
    samples = read_samples(write(*[ROW] * 500, ROW | given), VOCAB_SIZE)
    log_probs = [np.array([-1.0, -2.0], np.float32)] * len(samples)
    filled = with_noisy_behavior(samples, log_probs, 0.05, seed=3)

    np.testing.assert_array_equal(filled[-1].behavior_log_probs, np.array([-3.0, -4.0], np.float32))
    noise = np.stack([s.behavior_log_probs for s in filled[:-1]]) - np.array([-1.0, -2.0])
    assert noise.std() == pytest.approx(0.05, rel=0.1) and abs(noise.mean()) < 0.01
    assert filled[0].behavior_log_probs.dtype == np.float32
    assert np.isnan(samples[0].behavior_log_probs).all(), "the samples given are left alone"
