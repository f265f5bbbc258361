"""One rollout batch as numbers."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vespo.algorithms.token_sums import TokenSums
from megatron_vespo.models.parameter_groups import GRADIENT_GROUPS
from megatron_vespo.observability.rollout_metrics import (
    pi_old_is_in_place,
    rollout_metrics,
    staleness_metrics,
    step_metrics,
)
from megatron_vespo.types import Completion, TokenSupports, VersionSpans
from tests.support.builders import make_completion, make_prompt, make_segments


def completion(reward: float, length: int, finish_reason: str = "stop") -> Completion:
    return make_completion(make_prompt(0, [1, 2, 3]), length, 0, finish_reason, reward=reward)


def test_rollout_metrics():
    groups = [
        [completion(1.0, 4), completion(0.0, 8, "length")],
        [completion(0.5, 1), completion(0.5, 3)],
        [completion(0.0, 8, "length"), completion(0.0, 6)],
        [completion(1.0, 2), completion(0.0, 0, "abort")],
    ]
    groups[0][1].rejections, groups[2][0].rejections = ("NaN", "NaN"), ("inf",)
    groups[1][0].num_retractions, groups[3][1].num_retractions = 1, 3
    assert rollout_metrics(groups, "group-mean-std") == {
        "reward/mean": 3 / 8,
        "reward/error_count": 0.0,
        "reward/timeout_count": 0.0,
        "reward/overlong_penalty_mean": 0.0,
        "rollout/zero_advantage_share": 2 / 4,
        "response/length_mean": 32 / 8,
        "response/length_p90": 8.0,
        "response/truncated_share": 2 / 8,
        "rollout/tokens": 32.0,
        "rollout/nonfinite_log_probs": 3.0,
        "rollout/retracted_share": 2 / 8,
    }


def test_given_tokens_are_in_no_length_and_counted_by_themselves():
    groups = [
        [
            make_completion(make_prompt(), 12, segments=make_segments(2, 5, 3, 1, 1), reward=1.0),
            make_completion(make_prompt(), 4, reward=0.0),
        ]
    ]
    metrics = rollout_metrics(groups, "group-mean")
    assert (metrics["response/length_mean"], metrics["rollout/tokens"]) == (5.0, 10.0)
    assert metrics["response/turns_mean"] == 2.0 and metrics["response/turns_max"] == 3.0
    assert metrics["response/given_tokens_mean"] == 3.0
    assert metrics["response/turn_limit_share"] == 0.0
    groups[0][0].finish_reason = "turns"
    assert rollout_metrics(groups, "group-mean")["response/turn_limit_share"] == 0.5


def test_sizes_of_supports():
    groups = [[completion(1.0, 2), completion(0.0, 3)]]
    assert not [name for name in rollout_metrics(groups, "group-mean") if "support" in name]
    for one, counts in zip(groups[0], ([1, 4], [1, 1, 3]), strict=True):
        one.supports = TokenSupports(np.array(counts, np.int32), np.arange(sum(counts), dtype=np.int32))
    metrics = rollout_metrics(groups, "group-mean")
    assert metrics["rollout/support_size_mean"] == 2.0 and metrics["rollout/support_size_max"] == 4.0
    assert metrics["rollout/single_choice_share"] == pytest.approx(3 / 5)


def test_parts_of_rewards_are_metrics():
    groups = [[completion(1.0, 4), completion(0.0, 8)], [completion(0.5, 1), completion(0.5, 3)]]
    groups[0][0].reward_parts = {"format": 1.0, "accuracy": 0.5}
    groups[1][1].reward_parts = {"format": 0.0}
    metrics = rollout_metrics(groups, "group-mean")
    assert {name: value for name, value in metrics.items() if "part" in name} == {
        "reward/part/accuracy": 0.5,
        "reward/part/format": 0.5,
    }


@pytest.mark.parametrize(
    ("denominator", "old_policy", "versions", "in_place"),
    [
        ("recomputed", "current", [5, 7], True),
        ("recomputed", "snapshot", [7, 7], True),
        ("recomputed", "snapshot", [5, 7], False),
        ("recomputed", "ewma", [7, 7], False),
        ("decoupled", "current", [7, 7], False),  # what the engine differs by is in its W
        ("rollout", "current", [7, 7], False),
    ],
)
def test_where_log_w_must_be_0(denominator, old_policy, versions, in_place):
    mini_batch = [SimpleNamespace(policy_versions=VersionSpans.of([version] * 3)) for version in versions]
    assert pi_old_is_in_place(denominator, old_policy, mini_batch, version=7) == in_place


def test_a_penalty_counts_for_the_advantages_not_for_the_reward():
    groups = [[completion(1.0, 4), completion(1.0, 8)], [completion(0.0, 4), completion(0.0, 4)]]
    groups[0][1].overlong_penalty = -0.5
    metrics = rollout_metrics(groups, "group-mean")
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/overlong_penalty_mean"] == -0.125
    assert metrics["rollout/zero_advantage_share"] == 0.5


@pytest.mark.parametrize(
    ("estimator", "share"), [("group-mean", 2 / 3), ("leave-one-out", 2 / 3), ("global", 0.0)]
)
def test_groups_of_equal_rewards_have_an_advantage_where_the_estimator_gives_them_one(estimator, share):
    groups = [[completion(reward, 4), completion(other, 4)] for reward, other in ((1, 1), (0, 0), (1, 0))]
    assert rollout_metrics(groups, estimator)["rollout/zero_advantage_share"] == pytest.approx(share)


def test_pairs_are_counted_where_there_are_any():
    groups = [[completion(1.0, 20), completion(0.0, 19)], [completion(1.0, 20), completion(0.0, 10)]]
    metrics = rollout_metrics(groups, "equal-length-pairs")
    assert metrics["rollout/zero_advantage_share"] == metrics["pairs/paired_share"] == 0.5
    assert metrics["pairs/length_gap_mean"] == pytest.approx(0.05)
    metrics = rollout_metrics(groups, "equal-length-pairs", length_gap=0.5)
    assert metrics["rollout/zero_advantage_share"] == 0.0 and metrics["pairs/paired_share"] == 1.0
    assert not any(name.startswith("pairs/") for name in rollout_metrics(groups, "group-mean"))


def gradient(**norms: float) -> np.ndarray:
    return np.array([norms.get(group, 0.0) for group in GRADIENT_GROUPS])


def step(**changes) -> dict:
    return {
        "log_w": np.array([0.0, 2.0], np.float32),
        "weight": np.array([1.0, 0.0], np.float32),
        "correction": np.array([1.5, 0.5], np.float32),
        "rejected": np.array([0.0, 0.5], np.float32),
        "log_mismatch_in_w": np.array([0.0, 0.0], np.float32),
        "log_mismatch": np.array([0.5, -0.5], np.float32),
        "loss": 0.25,
        "zero_weight_share": 0.0,
        "clip_bounds": np.zeros(2),
        "grad_norm": 3.0,
        "ratio_sums": TokenSums(10.0, 101.0, 5.0),
        "log_mismatch_sums": TokenSums(-20.0, 4.0, 1.0),
        "reference_sums": TokenSums(np.nan, np.nan, np.nan),
        "gradient_norms": gradient(router=1.0, experts=2.0, norms=2.0, last_third=2.5),
        "entropy": 2.0,
        "learning_rate": 1e-4,
        "padding_share": 0.1,
        "imbalance": 0.0,
        "num_tokens": 100,
        "lag": 0.0,
        "kernel_c2": np.full(2, np.nan),
        "expected_w": np.full(2, np.nan),
    } | changes


STEPS = [
    step(),
    step(
        log_w=np.array([-4.0, 2.0], np.float32),
        weight=np.array([0.5, 0.5], np.float32),
        correction=np.array([0.0, 1.0], np.float32),
        rejected=np.array([1.0, 0.0], np.float32),
        log_mismatch=np.array([1.5, -1.5], np.float32),
        loss=0.75,
        zero_weight_share=0.25,
        grad_norm=1.0,
        ratio_sums=TokenSums(5.0, 50.0, 1.0),
        log_mismatch_sums=TokenSums(-10.0, 5.0, 2.0),
        gradient_norms=gradient(router=1.0),
        entropy=1.0,
        learning_rate=2e-4,
        padding_share=0.3,
        imbalance=0.5,
        num_tokens=50,
        lag=1.0,
    ),
]


def test_step_metrics():
    advantages = np.array([1.0, -1.0, 1.0, -1.0], np.float32)
    metrics = step_metrics(STEPS, advantages, np.array([40, 70, 70, 70]))
    assert metrics == pytest.approx(
        {
            "ratio/log_w_mean": 0.0,
            "ratio/log_w_std": np.sqrt(6.0),
            "ratio/log_w_abs_max": 4.0,
            "ratio/staleness_std": np.sqrt(6.0),
            "ratio/mismatch_std": 0.0,
            "ratio/mismatch_share": 0.0,
            "ratio/engine_gap_std": np.sqrt(1.25),
            "ratio/token_sigma": np.sqrt(151 / 150 - 0.01),
            "ratio/engine_token_sigma": np.sqrt(9 / 150 - 0.04),
            "kl/k1": -0.1,
            "kl/k2": 151 / 300,
            "kl/k3": 6 / 150,
            "kl/engine_k1": 0.2,
            "kl/engine_k2": 9 / 300,
            "kl/engine_k3": 3 / 150,
            "weight/mean": 0.5,
            "weight/ess": 4.0 / (4 * 1.5),
            "weight/dead_share": 0.25,
            "weight/mean/positive": 0.75,
            "weight/ess/positive": 1.5**2 / (2 * 1.25),
            "weight/dead_share/positive": 0.0,
            "weight/mean/positive/0-64": 1.0,
            "weight/dead_share/positive/0-64": 0.0,
            "weight/count/positive/0-64": 1.0,
            "weight/mean/positive/64-128": 0.5,
            "weight/dead_share/positive/64-128": 0.0,
            "weight/count/positive/64-128": 1.0,
            "weight/mean/negative": 0.25,
            "weight/ess/negative": 0.5,
            "weight/dead_share/negative": 0.5,
            "weight/mean/negative/64-128": 0.25,
            "weight/dead_share/negative/64-128": 0.5,
            "weight/count/negative/64-128": 2.0,
            "weight/mean/mini_batch_0": 0.5,
            "weight/ess/mini_batch_0": 0.5,
            "weight/dead_share/mini_batch_0": 0.5,
            "weight/mean/mini_batch_1": 0.5,
            "weight/ess/mini_batch_1": 1.0,
            "weight/dead_share/mini_batch_1": 0.0,
            "mismatch/weight_mean": 0.75,
            "mismatch/rejected_share": 0.375,
            "mismatch/dead_share": 0.0,  # one is dead, by its log W
            "loss/zero_weight_share": 0.125,
            "train/loss": 0.5,
            "train/grad_norm": 2.0,
            "train/grad_norm_max": 3.0,
            "gradient/router": 1.0,
            "gradient/experts": 2.0,
            "gradient/norms": 2.0,
            "gradient/last_third": 2.5,
            "train/learning_rate": 2e-4,
            "train/entropy": 1.5,
            "train/padding_share": 0.2,
            "train/imbalance": 0.25,
            "train/tokens": 150.0,
            "policy/lag_mean": 0.5,
        }
    )
    assert {type(value) for value in metrics.values()} == {float}


UNKNOWN = dict.fromkeys(("log_mismatch_in_w", "log_mismatch"), np.full(2, np.nan, np.float32))


def test_without_pi_old_the_first_step_measures_the_engine():
    """Its policy is the one that sampled; the second one's differs by staleness, too."""
    steps = [one | UNKNOWN for one in STEPS]
    metrics = step_metrics(steps, np.ones(4, np.float32), np.full(4, 10))
    assert metrics["ratio/engine_token_sigma"] == 0.0  # 4 / 100 - (20 / 100)^2
    assert metrics["kl/engine_k1"] == 0.2 and metrics["kl/k1"] == -0.1
    assert metrics["ratio/engine_gap_std"] == 1.0
    assert metrics["ratio/mismatch_share"] == pytest.approx(1 / 6)


def test_without_pi_old_and_with_a_policy_that_is_ahead_nothing_measures_it():
    steps = [one | UNKNOWN | {"lag": 1.0} for one in STEPS]
    metrics = step_metrics(steps, np.ones(4, np.float32), np.full(4, 10))
    assert not [name for name in metrics if "engine" in name or "ratio/mismatch" in name]
    assert metrics["weight/mean"] == 0.5 and metrics["kl/k1"] == -0.1


def test_a_floor_is_handed_on_and_grows_with_the_length():
    floor = {"ratio/floor_token_sigma": 0.1, "ratio/floor_std": 0.5}
    plain = step_metrics(STEPS, np.ones(4, np.float32), np.full(4, 10))
    metrics = step_metrics(STEPS, np.ones(4, np.float32), np.full(4, 10), floor)
    moved = np.concatenate([step["log_w"] - step["log_mismatch_in_w"] for step in STEPS]) != 0
    assert metrics["ratio/floor_share"] == pytest.approx(
        0.1 * moved.mean() / np.concatenate([step["log_w"] for step in STEPS]).var()
    )
    assert metrics["ratio/staleness_std"] < plain["ratio/staleness_std"]
    assert metrics.keys() - plain.keys() == {*floor, "ratio/floor_share"}


def test_budget_metrics_are_those_of_a_budget():
    steps = [
        STEPS[0] | {"kernel_c2": np.array([3.0, 2.0]), "expected_w": np.array([1.5, np.nan])},
        STEPS[1] | {"kernel_c2": np.array([3.1, 2.0]), "expected_w": np.array([1.0, np.nan])},
    ]
    metrics = step_metrics(steps, np.ones(4, np.float32), np.full(4, 10))
    assert {name: value for name, value in metrics.items() if name.startswith("budget/")} == {
        "budget/c2_positive": 3.1,
        "budget/c2_negative": 2.0,
        "budget/expected_w_positive": 1.25,
        "budget/held_share_positive": 0.0,
        "budget/held_share_negative": 1.0,
    }


def test_bounds_that_bapo_has_chosen_are_means_over_the_steps():
    steps = [
        one | {"clip_bounds": np.array(b)} for one, b in zip(STEPS, ([0.6, 1.5], [0.7, 3.0]), strict=True)
    ]
    metrics = step_metrics(steps, np.ones(4, np.float32), np.full(4, 10))
    assert {name: value for name, value in metrics.items() if name.startswith("loss/")} == pytest.approx(
        {"loss/bapo_clip_low": 0.65, "loss/bapo_clip_high": 2.25, "loss/zero_weight_share": 0.125}
    )


def staleness_group(*versions: list[int]) -> list[Completion]:
    return [make_completion(make_prompt(5), len(row), row) for row in versions]


def test_staleness_is_that_of_the_oldest_token_at_its_own_optimizer_step():
    """Two mini-batches from step 6 on: lags 6 - 4, 6 - 3 and 7 - 6, 7 - 5."""
    groups = [staleness_group([4, 4], [3, 4]), staleness_group([6], [5, 5, 6])]
    metrics = staleness_metrics(groups, first_step=6, mini_batches=2, max_staleness=3)
    assert metrics == {
        "staleness/total_mean": 2.0,
        "staleness/total_max": 3.0,
        "staleness/asynchronous_mean": 1.5,
        "staleness/mixed_share": 0.5,
        **{f"staleness/share/{lag}": share for lag, share in enumerate((0.0, 0.25, 0.5, 0.25))},
    }
    with pytest.raises(RuntimeError, match="from optimizer step 6 on are 1 to 3 steps old, not 0 to 2; the "):
        staleness_metrics(groups, first_step=6, mini_batches=2, max_staleness=2)
    with pytest.raises(RuntimeError, match="-1 to"):
        staleness_metrics(groups, first_step=4, mini_batches=2, max_staleness=3)


def test_reference_metrics_are_means_over_the_tokens_of_all_steps():
    """The sums are of log ref - log pi."""
    steps = [
        STEPS[0] | {"reference_sums": TokenSums(-30.0, 9.0, 4.0), "kl_loss": 0.25},
        STEPS[1] | {"reference_sums": TokenSums(-10.0, 9.0, 2.0), "kl_loss": 0.75},
    ]
    num_tokens = sum(step["num_tokens"] for step in steps)
    metrics = step_metrics(steps, np.ones(4, np.float32), np.full(4, 10))
    assert {name: value for name, value in metrics.items() if name.startswith("reference/")} == {
        "reference/kl_k1": 40.0 / num_tokens,
        "reference/kl_k3": 6.0 / num_tokens,
        "reference/kl_loss": 0.5,
    }
    assert not any(name.startswith("reference/") for name in step_metrics(STEPS, np.ones(4), np.full(4, 10)))
