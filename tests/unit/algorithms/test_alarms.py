"""Every rule: when it fires, when it does not, and whether it names the right cause."""

import math

import numpy as np
import pytest

from megatron_vespo.algorithms.alarms import (
    AGAINST_ROUNDING,
    LOG_W_SPREAD,
    REPEAT_AFTER,
    RULES,
    Alarm,
    check,
    is_news,
)

RECOMPUTED = "use --ratio-denominator recomputed or --routing-replay R3"
FEWER_STEPS = "use fewer --steps-per-rollout or a lower --lr"
NAN = math.nan


def history(number: int = 12, **metrics: float) -> list[dict[str, float]]:
    """So many batches with the same metrics; "__" stands for "/"."""
    return [{name.replace("__", "/"): value for name, value in metrics.items()} for _ in range(number)]


def only(alarms: list[Alarm], name: str) -> Alarm:
    assert [alarm.name for alarm in alarms] == [name]
    return alarms[0]


def test_names_are_those_of_the_rules_and_a_batch_without_metrics_has_no_alarm():
    assert check({}, []) == [] and check({}, history(30, train__entropy=1.0)) == []
    assert len({rule.__name__ for rule in RULES}) == len(RULES) == 10


# Passes that differ


def test_two_passes_of_one_policy_that_differ_by_anything():
    name = "check/unchanged_log_w_abs_max"
    assert check({name: 0.0}, []) == []
    alarm = only(check({name: 6e-8}, []), "passes_differ")
    assert alarm.message == (
        "log W of the first mini-batch, whose policy has not moved, is up to 6e-08, it must be 0"
    )


# Dead sequences

LONG = "negative/4k-8k"


def dead(share: float, count: float = 50.0, **more: float) -> dict[str, float]:
    return {f"weight/dead_share/{LONG}": share, f"weight/count/{LONG}": count} | {
        name.replace("__", "/"): value for name, value in more.items()
    }


@pytest.mark.parametrize(
    ("mismatch_share", "explained", "advice"),
    [
        (0.91, "mismatch explains 91% of var(log W)", RECOMPUTED),
        (0.2, "staleness explains 80% of var(log W)", FEWER_STEPS),
        (
            NAN,
            "what spreads log W is not known",
            f"if `ratio/engine_gap_std` is large, {RECOMPUTED}; else {FEWER_STEPS}",
        ),
    ],
)
def test_dead_sequences_and_their_cause(mismatch_share, explained, advice):
    metrics = dead(0.72, ratio__mismatch_share=mismatch_share)
    alarm = only(check(metrics, []), "dead_sequences")
    assert alarm.message == f"72% of negative sequences of 4k-8k tokens are dead; {explained}"
    assert alarm.advice == advice
    assert str(alarm) == f"{alarm.message}: {advice}"


@pytest.mark.parametrize(
    ("mismatch", "floor", "explained", "advice"),
    [
        (0.0, 0.9, "rounding explains 90% of var(log W)", AGAINST_ROUNDING),
        (0.0, 0.3, "staleness explains 70% of var(log W)", FEWER_STEPS),
        (0.3, 0.45, "rounding explains 45% of var(log W)", AGAINST_ROUNDING),
        (0.6, 0.3, "mismatch explains 60% of var(log W)", RECOMPUTED),
        (NAN, 0.6, "rounding explains 60% of var(log W)", AGAINST_ROUNDING),
    ],
)
def test_what_rounding_explains_is_not_blamed_on_staleness(mismatch, floor, explained, advice):
    metrics = {"ratio/mismatch_share": mismatch, "ratio/floor_share": floor}
    for name, batch in (("dead_sequences", dead(0.72)), ("ess_collapse", {"weight/ess": 0.04})):
        alarm = only(check(batch | metrics, []), name)
        assert explained in alarm.message and alarm.advice == advice
    assert check(metrics | {"weight/ess": 0.5}, []) == []


def test_without_shares_a_small_floor_is_no_cause():
    metrics = {"weight/ess": 0.04, "ratio/floor_share": 0.4}
    assert "is not known" in only(check(metrics, []), "ess_collapse").message


@pytest.mark.parametrize("metrics", [dead(0.5), dead(1.0, count=15.0), dead(NAN), dead(0.9, count=NAN)])
def test_few_dead_or_few_sequences_are_no_alarm(metrics):
    assert check(metrics, []) == []


def test_the_worst_kind_of_sequences_with_enough_of_them_is_named():
    metrics = dead(0.6) | {
        "weight/dead_share/positive/8k-16k": 0.8,
        "weight/count/positive/8k-16k": 16.0,
        "weight/dead_share/negative/8k-16k": 1.0,
        "weight/count/negative/8k-16k": 3.0,
        "weight/dead_share/negative": 0.9,  # no kind, it has no count
    }
    assert "80% of positive sequences of 8k-16k" in only(check(metrics, []), "dead_sequences").message


# Effective sample size


@pytest.mark.parametrize(("share", "advice"), [(0.8, RECOMPUTED), (0.1, FEWER_STEPS)])
def test_ess_collapse_names_the_cause_and_the_worst_mini_batch(share, advice):
    metrics = {"weight/ess": 0.04, "weight/ess/mini_batch_0": 0.9, "weight/ess/mini_batch_7": 0.01}
    alarm = only(check(metrics | {"ratio/mismatch_share": share}, []), "ess_collapse")
    assert "4.0% of the samples" in alarm.message and alarm.message.endswith("; mini-batch 7 is the worst")
    assert alarm.advice == advice
    one = only(check({"weight/ess": 0.04, "ratio/mismatch_share": share}, []), "ess_collapse")
    assert "worst" not in one.message


def test_a_tenth_of_the_samples_is_enough():
    assert check({"weight/ess": 0.1, "weight/ess/mini_batch_7": 0.01}, []) == []


WIDER_BOUNDS = "use --routing-replay R3, the same precision in engine and trainer, or wider --mismatch-bounds"


def test_what_a_correction_rejects_is_not_blamed_on_log_w():
    """`recomputed`, whose log W has no mismatch: staleness would be blamed for all of it."""
    blamed = {"ratio/mismatch_share": 0.0, "mismatch/dead_share": 0.9}
    alarm = only(check(dead(0.72) | blamed, []), "dead_sequences")
    assert alarm.message.endswith("tokens are dead; --mismatch-correction alone kills 90% of the dead")
    assert alarm.advice == WIDER_BOUNDS
    assert only(check(dead(0.72) | blamed | {"mismatch/dead_share": 0.4}, []), "dead_sequences").advice == (
        FEWER_STEPS
    )
    # few effective samples although most of them live: then the dead are not why
    for dead_share, advice in ((0.95, WIDER_BOUNDS), (0.02, FEWER_STEPS)):
        metrics = blamed | {"weight/ess": 0.04, "weight/dead_share": dead_share}
        assert only(check(metrics, []), "ess_collapse").advice == advice


# Entropy


def test_entropy_collapse():
    before = history(5, train__entropy=0.5)
    alarm = only(check({"train/entropy": 0.04, "reward/mean": 0.3}, before), "entropy_collapse")
    assert "0.04 nats a token, 8%" in alarm.message and "--lr" in alarm.advice


@pytest.mark.parametrize(
    ("metrics", "number"),
    [
        ({"train/entropy": 0.051, "reward/mean": 0.3}, 5),
        ({"train/entropy": 0.04, "reward/mean": 0.95}, 5),  # solved
        ({"train/entropy": 0.04, "reward/mean": 0.3}, 4),  # the start is not over
    ],
)
def test_no_entropy_collapse(metrics, number):
    assert check(metrics, history(number, train__entropy=0.5)) == []


@pytest.mark.parametrize(("start", "quiet", "loud"), [(0.2, 0.69, 0.71), (2.0, 3.9, 4.1)])
def test_entropy_explosion_is_twice_the_start_and_half_a_nat(start, quiet, loud):
    # later batches do not move what it is compared with
    before = history(5, train__entropy=start) + history(9, train__entropy=quiet)
    assert check({"train/entropy": quiet}, before) == []
    alarm = only(check({"train/entropy": loud}, before), "entropy_explosion")
    assert f"{loud / start:.1f} times" in alarm.message


# Gradient

QUIET = {
    "train__grad_norm_max": 1.0,
    "gradient__router": 0.1,
    "gradient__experts": 0.9,
    "gradient__first_third": 0.7,
    "gradient__last_third": 0.7,
}


def test_a_gradient_spike_names_the_part_that_grew():
    metrics = {
        "train/grad_norm_max": 6.0,
        "gradient/router": 5.5,
        "gradient/experts": 2.0,
        "gradient/first_third": 0.7,
        "gradient/last_third": 5.9,
    }
    alarm = only(check(metrics, history(10, **QUIET)), "gradient_spike")
    assert alarm.message == (
        "a gradient norm of 6 is 6.0 times the usual 1, most of it in router and the last third of the layers"
    )
    assert "--routing-replay" in alarm.advice
    metrics |= {"gradient/router": 0.1, "gradient/attention": 5.5}  # a part that had no gradient before
    alarm = only(check(metrics, history(10, **QUIET)), "gradient_spike")
    assert "most of it in attention" in alarm.message and "--routing-replay" not in alarm.advice


@pytest.mark.parametrize(("value", "number", "usual"), [(5.0, 10, 1.0), (9.0, 9, 1.0), (9.0, 10, 0.0)])
def test_no_gradient_spike(value, number, usual):
    metrics = {"train/grad_norm_max": value, "gradient/router": value}
    assert check(metrics, history(number, train__grad_norm_max=usual)) == []


def test_a_spike_is_measured_against_the_last_batches_and_not_moved_by_another_spike():
    before = history(30, train__grad_norm_max=10.0) + history(20, train__grad_norm_max=1.0)
    before[-1]["train/grad_norm_max"] = 100.0
    assert "the usual 1" in only(check({"train/grad_norm_max": 6.0}, before), "gradient_spike").message


# Engine and trainer


@pytest.mark.parametrize(
    ("mismatch_std", "advice"),
    [(0.5, "it is in W: use --ratio-denominator recomputed"), (0.0, "it is not in W, but the samples are")],
)
def test_a_sigma_that_the_length_makes_too_large(mismatch_std, advice):
    metrics = {
        "ratio/engine_token_sigma": 0.03,
        "response/length_p90": 8192.0,
        "ratio/mismatch_std": mismatch_std,
    }
    alarm = only(check(metrics, []), "engine_mismatch")
    assert "sigma 0.03 a token" in alarm.message and "8,192 tokens by 2.7" in alarm.message
    assert alarm.advice.startswith(advice) and "--routing-replay R3" in alarm.advice
    assert check(metrics | {"response/length_p90": 1024.0}, []) == []
    assert check(metrics | {"ratio/engine_token_sigma": 0.01}, []) == []
    noisy = only(check(metrics | {"ratio/floor_token_sigma": 0.027 * 2**0.5}, []), "engine_mismatch").advice
    assert "the trainer's own rounding explains 81% of it: " in noisy and "recomputed" not in noisy
    assert (
        only(check(metrics | {"ratio/floor_token_sigma": 0.02}, []), "engine_mismatch").advice == alarm.advice
    )
    old = only(check(metrics | {"staleness/asynchronous_mean": 2.25}, []), "engine_mismatch").advice
    assert old.startswith("samples are 2.2 steps old, which is in it unless --old-policy snapshot; ")


@pytest.mark.parametrize(
    ("spread", "dead_share"), [(0.03 * 2048**0.5, 0.21), (0.01 * 8192**0.5, 0.04), (LOG_W_SPREAD, 0.23)]
)
def test_the_bound_of_the_spread_is_where_a_fifth_of_the_negatives_is_dead(spread, dead_share):
    """phi(W) of A < 0 under log W ~ N(-spread^2 / 2, spread^2), for which E[W] = 1."""
    log_w = np.random.default_rng(0).normal(-(spread**2) / 2, spread, 200_000)
    phi = np.exp(3 * log_w + 2 * (1 - np.exp(log_w)))
    assert (phi < 0.01).mean() == pytest.approx(dead_share, abs=0.01)


# Rewards and responses


def test_equal_groups():
    failing = only(check({"rollout/zero_advantage_share": 0.95, "reward/mean": 0.02}, []), "equal_groups")
    assert "95% of the groups" in failing.message and "more --group-size" in failing.advice
    filtered = {"rollout/zero_advantage_share": 0.95, "reward/mean": 0.02, "rollout/generated_prompts": 320.0}
    alarm = only(check(filtered, []), "equal_groups")
    assert "--dynamic-sampling" not in alarm.advice and "easier prompts" in alarm.advice
    solved = only(check({"rollout/zero_advantage_share": 0.95, "reward/mean": 0.99}, []), "equal_groups")
    assert "harder prompts" in solved.advice
    assert check({"rollout/zero_advantage_share": 0.9, "reward/mean": 0.99}, []) == []


def test_truncated_responses():
    alarm = only(check({"response/truncated_share": 0.51}, []), "truncated_responses")
    assert "51%" in alarm.message and "--max-completion-tokens" in alarm.message
    assert check({"response/truncated_share": 0.5}, []) == []


@pytest.mark.parametrize(
    ("rewards", "fires"),
    [
        ([0.2] * 5 + [0.8] * 5 + [0.3] * 5, True),
        ([0.2] * 5 + [0.8] * 5 + [0.5] * 5, False),
        ([0.2] * 5 + [0.8] * 5 + [0.0], False),  # one bad batch
        ([0.8] * 5 + [0.0] * 4, True),  # means of five count from the first on
        ([0.8, 0.0, 0.0], False),
        ([0.0] * 20, False),
        ([-1.0] * 5 + [-1.4] * 5, False),
        ([-1.0] * 5 + [-1.6] * 5, True),
        ([0.8] * 10 + [NAN], False),
    ],
)
def test_reward_collapse(rewards, fires):
    batches = [{"reward/mean": reward} for reward in rewards]
    alarms = check(batches[-1], batches[:-1])
    assert [alarm.name for alarm in alarms] == ["reward_collapse"] * fires


def test_reward_collapse_says_how_far():
    batches = [{"reward/mean": reward} for reward in [0.8] * 5 + [0.2] * 5]
    assert "fell to 0.2, the best was 0.8" in check(batches[-1], batches[:-1])[0].message


# Saying it


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ([False, *[True] * (2 * REPEAT_AFTER + 1)], [1, 1 + REPEAT_AFTER, 1 + 2 * REPEAT_AFTER]),
        ([True, False] * REPEAT_AFTER, [0, REPEAT_AFTER]),  # comes and goes
        ([True, *[False] * (REPEAT_AFTER + 4), True, True], [0, REPEAT_AFTER + 5]),
        ([True, *[False] * (REPEAT_AFTER - 2), True, True], [0, REPEAT_AFTER]),
    ],
)
def test_an_alarm_is_news_at_first_and_now_and_then(on, expected):
    alarm, batches, said = Alarm("ess_collapse", "m", "a"), [], []
    for index, now in enumerate(on):
        if now and is_news(alarm, batches):
            said.append(index)
        batches.append({"alarm/other": 1.0} | ({"alarm/ess_collapse": 1.0} if now else {}))
    assert said == expected
