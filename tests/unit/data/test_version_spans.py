"""Token ids and policy versions as the types keep them, and what callers may give instead."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from megatron_vespo.types import Prompt, VersionSpans, token_array
from tests.support.builders import make_completion, make_sample


def drawn(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 4, draw.integers(0, 30))


@pytest.mark.parametrize("seed", range(50))
def test_spans_say_what_one_version_per_token_says(seed):
    versions = drawn(seed)
    spans = VersionSpans.of(versions)
    np.testing.assert_array_equal(spans.array(), versions.astype(np.int64), strict=True)
    assert len(spans) == len(versions) and spans.total() == versions.sum()
    assert all(a != b for a, b in zip(spans.versions, spans.versions[1:], strict=False))
    assert all(length > 0 for length in spans.lengths)
    assert all(type(number) is int for number in spans.versions + spans.lengths)
    assert spans.are_all(2) == bool((versions == 2).all())
    if len(versions):
        assert (spans.oldest, spans.newest, spans.last) == (versions.min(), versions.max(), versions[-1])
    assert VersionSpans.of(spans) is spans and pickle.loads(pickle.dumps(spans)) == spans


@pytest.mark.parametrize("seed", range(20))
def test_joined_spans_are_those_of_the_joined_tokens(seed):
    parts = [drawn(seed + 100 * i) for i in range(3)]
    joined = VersionSpans.joined(VersionSpans.of(part) for part in parts)
    assert joined == VersionSpans.of(np.concatenate(parts))


def test_spans_of_one_version():
    assert VersionSpans.single(5, 3) == VersionSpans.of([5, 5, 5])
    assert VersionSpans.single(5, 0) == VersionSpans.of([]) == VersionSpans.joined([])


def test_lists_become_arrays_and_spans():
    for completion in (make_completion(tokens=2), replace(make_completion(), token_ids=[5, 6, 7])):
        assert completion.token_ids.dtype == np.int32
    sample = replace(make_sample(2, 2), token_ids=[1, 2, 3, 4], policy_versions=np.array([3, 4]))
    assert sample.token_ids.dtype == np.int32 and sample.policy_versions == VersionSpans((3, 4), (1, 1))
    assert Prompt(0, [1, 2], "", "").token_ids.dtype == np.int32


def test_an_int32_array_is_shared_not_copied():
    token_ids = np.arange(3, dtype=np.int32)
    assert token_array(token_ids) is token_ids
    assert replace(make_completion(), token_ids=token_ids).token_ids is token_ids


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2**31], "token ids from 1 to 2147483648 do not fit into 32 bits"),
        (np.array([-(2**40), 0]), "token ids from -1099511627776 to 0 do not fit into 32 bits"),
        ([1.0, 2.0], "token ids must be integers, not float64"),
    ],
)
def test_other_token_ids_are_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        token_array(given)


def test_prompts_are_equal_by_value():
    prompt = Prompt(3, [1, 2], "42", "question", {"level": 3})
    assert prompt == Prompt(3, np.array([1, 2]), "42", "question", {"level": 3})
    assert prompt != replace(prompt, token_ids=[1, 3]) and prompt != replace(prompt, answer="43")
