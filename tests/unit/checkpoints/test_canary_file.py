"""Samples and log-probs through the canary file, and what counts as the same policy."""

import dataclasses
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vespo.checkpoints.canary_file import (
    NUM_CANARIES,
    CanaryMismatchError,
    canaries_of,
    compare,
    decode,
    encode,
)
from megatron_vespo.checkpoints.run_folder import entry_of
from megatron_vespo.cluster.trainer_worker import TrainerWorker
from megatron_vespo.observability.tracing import Spans
from megatron_vespo.trainer.checkpoint import Stored
from megatron_vespo.types import TokenSupports, TrainingSample, VersionSpans
from tests.support.builders import make_sample, make_segments
from tests.support.settings import flat_settings


def sample(prompt: int, completion: int) -> TrainingSample:
    draw = np.random.default_rng(prompt)
    routes = draw.integers(0, 9, (prompt + completion - 1, 2, 2)).astype(np.uint8)
    return make_sample(
        *np.split(draw.integers(0, 99, prompt + completion), [prompt]),
        behavior_log_probs=-draw.random(completion, np.float32),
        policy_versions=VersionSpans.single(3, completion),
        advantage=-0.25,
        reward=0.5,
        temperature=0.7,
        group_id=prompt,
        routed_experts=routes,
        routes_version=3,
    )


def test_they_come_back_bit_for_bit_but_for_routes():
    supports = TokenSupports(np.array([2, 1, 3], np.int32), np.array([4, 9, 7, 0, 2, 5], np.int32))
    conversation = make_sample(3, 6, segments=make_segments(1, 3, 2), supports=supports)
    samples = [sample(2, 5), conversation, sample(7, 1)]
    log_probs = [-np.random.default_rng(9).random(n, np.float32) for n in (5, 3, 1)]
    found, found_log_probs = decode(encode(samples, log_probs))
    for expected, actual in zip(samples, found, strict=True):
        assert actual.routed_experts is None and actual.routes_version is None
        expected = dataclasses.replace(expected, routed_experts=None, routes_version=None)
        for field in dataclasses.fields(TrainingSample):
            before, after = getattr(expected, field.name), getattr(actual, field.name)
            if field.name == "supports" and before is not None:
                before, after = (np.concatenate([one.counts, one.token_ids]) for one in (before, after))
            np.testing.assert_array_equal(after, before, err_msg=field.name)
            if isinstance(before, np.ndarray):
                assert after.dtype == before.dtype, field.name
            else:
                assert type(after) is type(before), field.name
    for expected, actual in zip(log_probs, found_log_probs, strict=True):
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", ["canary.npz", "probe.npz"])
def test_canaries_of_older_checkpoints_are_compared_too(name, tmp_path):
    saved = [np.float32([-1.0, -2.0])]
    content = encode([sample(2, 2)], saved)
    (tmp_path / name).write_bytes(content)
    worker = object.__new__(TrainerWorker)
    worker._settings = flat_settings(bf16=False)
    worker.policy = SimpleNamespace(
        log_probs=lambda samples, tracked: [values + np.float32(2**-15) for values in saved],
    )
    assert worker._check_canaries(Stored(tmp_path, {}, {name: entry_of(content)}, {})) == 2**-15
    assert worker._check_canaries(Stored(tmp_path, {}, {}, {})) is None


def test_a_rank_copies_the_canaries_it_is_given():
    """Ray hands them over as views into an object of its store, which a view would keep there."""
    buffers: list[pickle.PickleBuffer] = []
    given = canaries_of([sample(3 + n, 4) for n in range(NUM_CANARIES + 2)])
    packed = pickle.dumps(given, protocol=5, buffer_callback=buffers.append)
    store = [bytes(buffer) for buffer in buffers]
    received = pickle.loads(packed, buffers=store)
    stored = [np.frombuffer(buffer, np.uint8) for buffer in store]
    worker = object.__new__(TrainerWorker)
    worker._settings = flat_settings(ratio_denominator="rollout", uses_reference=False)
    worker._args = worker._settings.values
    worker._spans, worker._memory = Spans(), SimpleNamespace(onload=lambda: None)
    worker.prepare(received)
    assert len(worker._canaries) == NUM_CANARIES
    for kept, view in zip(worker._canaries, received, strict=True):
        assert kept.routed_experts is None
        assert kept.policy_versions == view.policy_versions
        for name in ("token_ids", "behavior_log_probs"):
            ours, theirs = getattr(kept, name), getattr(view, name)
            np.testing.assert_array_equal(ours, theirs, strict=True)
            assert any(np.shares_memory(theirs, part) for part in stored), "the test sees views"
            assert not any(np.shares_memory(ours, part) for part in stored), name
            assert ours.base is None and ours.flags.owndata


def test_fp32_compares_the_largest_difference():
    saved = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
    close = [saved[0], saved[1] + 9e-5]
    assert compare(saved, close, bf16=False, where="here") == pytest.approx(9e-5, rel=0.01)
    with pytest.raises(CanaryMismatchError, match="^here does not .* 2 samples differ by 1.1.e-04 .largest."):
        compare(saved, [saved[0], saved[1] + 1.1e-4], bf16=False, where="here")


def test_bf16_compares_the_mean():
    saved = [np.zeros(100, np.float32)]
    flipped = np.zeros(100, np.float32)
    flipped[3] = 0.5  # one token whose router chose another expert
    assert compare(saved, [flipped], bf16=True, where="here") == 0.5
    with pytest.raises(CanaryMismatchError, match="mean"):
        compare(saved, [flipped + 0.06], bf16=True, where="here")


@pytest.mark.parametrize("bf16", [False, True])
def test_no_number_is_no_match(bf16):
    with pytest.raises(CanaryMismatchError):
        compare([np.zeros(2, np.float32)], [np.array([0, np.nan], np.float32)], bf16, "here")
