"""Recorded values of tokens: those that log W was summed from, at every layout, and nothing if not wanted."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest

from megatron_vespo.algorithms.vespo import RATIO_DENOMINATORS
from megatron_vespo.data.token_values import JoinedTokens, TokenValues, joined
from tests.support.named_layouts import LAYOUTS
from tests.support.random_task import split

NAMES = ("places", "pi", "pi_old", "routed_places", "expert_differences")
FLAGS = "--max-tokens-per-gpu 128 --lr 1e-3"
QUICK = ("tp2", "pp2 vpp2", "cp2", "dp2, small packs", "tp2 pp2 ep2")
TOLERANCE = 1e-6  # per token, in nats: log pi is rounded to float32


@pytest.fixture(scope="module")
def recorded(on_task):
    @functools.cache
    def run(layout: str, more: str = ""):
        num_ranks, layout_flags = LAYOUTS[layout]
        return on_task("token_values.py", num_ranks, *f"{FLAGS} {layout_flags} {more}".split())

    return run


def tokens_of(results, step: int, samples) -> JoinedTokens:
    """What all ranks of the run have handed back, put together as in a run."""
    parts = [
        TokenValues(*(result.get(f"{step} {name}") for name in NAMES))
        for result in results
        if f"{step} places" in result
    ]
    return joined(parts, sum(sample.num_trained for sample in samples))


def mini_batches(task):
    size = len(task.samples) // 2
    return task.samples[:size], task.samples[size:]


def log_w_of(tokens: JoinedTokens, samples, denominator: str, in_w: np.ndarray) -> np.ndarray:
    mu = np.concatenate([sample.behavior_log_probs for sample in samples])
    below = mu if denominator == "rollout" else tokens.pi_old
    assert below is not None
    sums = [one.sum() for one in split(tokens.pi.astype(np.float64) - below, samples)]
    return np.array(sums) + (0.0 if denominator in ("rollout", "recomputed") else in_w)


def check(results, task, denominator: str) -> None:
    for step, samples in enumerate(mini_batches(task)):
        tokens = tokens_of(results, step, samples)
        assert (tokens.pi_old is None) == (denominator == "rollout")
        lengths = np.array([sample.num_trained for sample in samples])
        for result in results:
            found = log_w_of(tokens, samples, denominator, result[f"{step} log_mismatch_in_w"])
            worst = np.abs(found - result[f"{step} log_w"]) / lengths
            assert worst.max() < TOLERANCE
        if denominator == "recomputed" and step == 1:  # the second step is off its pi_old
            assert np.abs(found).max() > 1e-3


@pytest.mark.parametrize("denominator", RATIO_DENOMINATORS)
def test_tokens_sum_to_log_w(recorded, task, denominator):
    check(recorded("one rank", f"--ratio-denominator {denominator}"), task, denominator)


@pytest.mark.parametrize(
    "layout",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_at_every_layout(recorded, task, layout):
    results = recorded(layout, "--ratio-denominator decoupled")
    check(results, task, "decoupled")
    one_rank = recorded("one rank", "--ratio-denominator decoupled")
    for step, samples in enumerate(mini_batches(task)):
        ours, expected = (tokens_of(found, step, samples) for found in (results, one_rank))
        np.testing.assert_allclose(ours.pi, expected.pi, rtol=0, atol=2e-4)
        np.testing.assert_allclose(ours.pi_old, expected.pi_old, rtol=0, atol=2e-4)


def test_the_unchanged_policy_is_the_references(recorded, task):
    samples = mini_batches(task)[0]
    tokens = tokens_of(recorded("one rank", "--ratio-denominator recomputed"), 0, samples)
    np.testing.assert_array_equal(tokens.pi, tokens.pi_old)
    np.testing.assert_allclose(tokens.pi, task.log_probs[: len(tokens.pi)], rtol=0, atol=1e-5)


def test_a_snapshot_is_recorded_as_pi_old(recorded, task):
    check(recorded("dp2", "--old-policy snapshot --ratio-denominator recomputed"), task, "recomputed")


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2 ep2"])
def test_recording_changes_nothing(recorded, layout):
    flags = "--ratio-denominator recomputed"
    for ours, plain in zip(recorded(layout, flags), recorded(layout, f"{flags} --plain"), strict=True):
        assert not any(name.split()[-1] in NAMES for name in plain)
        for name in ("log_w", "loss", "grad_norm"):
            for step in range(2):
                np.testing.assert_array_equal(ours[f"{step} {name}"], plain[f"{step} {name}"])


def differences(given: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of routes [tokens, L, K]: how many given experts are not among the chosen ones, over layers."""
    return (given[..., :, None] != chosen[..., None, :]).all(-1).sum((1, 2))


EXPERT_LAYOUTS = {
    "one rank": "",
    "pp2 vpp2": "",
    "tp2 pp2 ep2": "",
    "cp2": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_that_the_router_would_not_have_chosen(recorded, task, layout):
    """The engine's routes are random here, so nearly all tokens differ; those of lost routes do not."""
    more = "--routing-replay R3 --random-routes --lost " + EXPERT_LAYOUTS[layout]
    results = recorded(layout, more)
    routes = pickle.loads(results[0]["given"].tobytes())
    samples = mini_batches(task)[0]
    tokens = tokens_of(results, 0, samples)
    assert tokens.expert_differences is not None
    [free] = recorded("one rank", more)
    # routers choose by what the layers below have made, which imposed experts change: only the first layer
    # chooses as in a free pass
    chosen, start = free["0 chosen"], 0
    assert chosen.shape[1] == 4
    for sample, given, found in zip(samples, routes, split(tokens.expert_differences, samples), strict=False):
        end = start + sample.num_tokens - 1
        predicting = np.flatnonzero(sample.sampled_mask()) + sample.prompt_length - 1
        if given is None:
            assert (found == 0).all()
        else:
            first = differences(given[predicting, :1], chosen[start:end][predicting, :1])
            assert (first <= found).all() and (found <= 8).all()
        start = end
    assert 3 < tokens.expert_differences.mean() < 6
    np.testing.assert_array_equal(tokens.expert_differences, tokens_of([free], 0, samples).expert_differences)


def test_routes_of_pi_old_differ_little(recorded, task):
    """R2: before the first update the router chooses what it has chosen; afterwards a few others."""
    results = recorded("dp2", "--routing-replay R2 --ratio-denominator recomputed")
    first, second = (
        tokens_of(results, step, samples).expert_differences
        for step, samples in enumerate(mini_batches(task))
    )
    assert first is not None and second is not None
    assert (first == 0).all()
    assert 0 < second.mean() < 2


def test_a_value_that_is_missing_or_twice_is_an_error():
    one = TokenValues(np.array([0, 2], np.int32), np.zeros(2, np.float32), None, None, None)
    with pytest.raises(ValueError, match="1 of 3 sampled tokens have not exactly one value"):
        joined([one], 3)
    with pytest.raises(ValueError, match="1 of 2"):
        joined([TokenValues(np.array([0, 0]), np.zeros(2), None, None, None)], 2)
