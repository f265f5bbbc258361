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


def only(name: str, *metrics: dict[str, float], before: list[dict[str, float]] = ()) -> Alarm:
    """The one alarm that these metrics of a batch raise."""
    [alarm] = check({key: value for some in metrics for key, value in some.items()}, list(before))
    assert alarm.name == name
    return alarm


def test_names_are_those_of_the_rules_and_a_batch_without_metrics_has_no_alarm():
    assert check({}, []) == [] and check({}, history(30, train__entropy=1.0)) == []
    assert len({rule.__name__ for rule in RULES}) == len(RULES) == 11


LONG = "negative/4k-8k"


def dead(share: float, count: float = 50.0) -> dict[str, float]:
    return {f"weight/dead_share/{LONG}": share, f"weight/count/{LONG}": count}


SOLVED = {"rollout/zero_advantage_share": 0.95, "reward/mean": 0.99}
FAILING = {"rollout/zero_advantage_share": 0.95, "reward/mean": 0.02}
START, COLLAPSED = history(5, train__entropy=0.5), {"train/entropy": 0.04, "reward/mean": 0.3}


@pytest.mark.parametrize(
    ("metrics", "before"),
    [
        ({"check/unchanged_log_w_abs_max": 0.0}, []),
        # few dead, or few sequences
        *((metrics, []) for metrics in (dead(0.5), dead(1.0, 15.0), dead(NAN), dead(0.9, NAN))),
        # a tenth of the samples is enough
        ({"weight/ess": 0.1, "weight/ess/mini_batch_7": 0.01}, []),
        ({"weight/ess": 0.5, "ratio/mismatch_share": 0.3, "ratio/floor_share": 0.45}, []),
        ({"train/entropy": 0.051, "reward/mean": 0.3}, START),
        ({"train/entropy": 0.04, "reward/mean": 0.95}, START),  # solved
        (COLLAPSED, START[1:]),  # the start is not over
        *(
            ({"train/grad_norm_max": value, "gradient/router": value}, history(n, train__grad_norm_max=usual))
            for value, n, usual in ((5.0, 10, 1.0), (9.0, 9, 1.0), (9.0, 10, 0.0))
        ),
        (SOLVED | {"rollout/zero_advantage_share": 0.9}, []),
        ({"response/truncated_share": 0.5}, []),
    ],
)
def test_no_alarm(metrics, before):
    assert check(metrics, before) == []


@pytest.mark.parametrize(
    ("name", "metrics", "before", "message", "advice"),
    [
        ("entropy_collapse", COLLAPSED, START, "0.04 nats per token, 8%", "--lr"),
        ("equal_groups", FAILING, [], "95% of the groups", "more --group-size"),
        ("equal_groups", FAILING | {"rollout/generated_prompts": 320.0}, [], "", "easier prompts"),
        ("equal_groups", SOLVED, [], "", "harder prompts"),
        ("equal_groups", FAILING | {"pairs/paired_share": 0.01}, [], "are a pair", "--pair-length-gap"),
        ("truncated_responses", {"response/truncated_share": 0.51}, [], "51%", ""),
        ("truncated_responses", {"response/truncated_share": 0.51}, [], "--max-completion-tokens", ""),
    ],
)
def test_what_an_alarm_says(name, metrics, before, message, advice):
    alarm = only(name, metrics, before=before)
    assert message in alarm.message and advice in alarm.advice
    # whoever filters already is not told to
    assert "rollout/generated_prompts" not in metrics or "--dynamic-sampling" not in alarm.advice


def test_two_passes_of_one_policy_that_differ_by_anything():
    assert only("passes_differ", {"check/unchanged_log_w_abs_max": 6e-8}).message == (
        "log W of the first mini-batch, whose policy has not moved, is up to 6e-08, it must be 0"
    )


# Causes of dead sequences and of few effective samples


UNKNOWN = f"if `ratio/engine_gap_std` is large, {RECOMPUTED}; else {FEWER_STEPS}"


@pytest.mark.parametrize(
    ("mismatch", "floor", "cause", "advice"),
    [
        (0.91, None, "mismatch explains 91% of var(log W)", RECOMPUTED),
        (0.2, None, "staleness explains 80% of var(log W)", FEWER_STEPS),
        (NAN, None, "what spreads log W is not known", UNKNOWN),
        (None, 0.4, "what spreads log W is not known", UNKNOWN),
        # what rounding explains is not blamed on staleness
        (0.0, 0.9, "rounding explains 90% of var(log W)", AGAINST_ROUNDING),
        (0.0, 0.3, "staleness explains 70% of var(log W)", FEWER_STEPS),
        (0.3, 0.45, "rounding explains 45% of var(log W)", AGAINST_ROUNDING),
        (0.6, 0.3, "mismatch explains 60% of var(log W)", RECOMPUTED),
        (NAN, 0.6, "rounding explains 60% of var(log W)", AGAINST_ROUNDING),
    ],
)
def test_dead_sequences_few_effective_samples_and_their_cause(mismatch, floor, cause, advice):
    shares = {"ratio/mismatch_share": mismatch, "ratio/floor_share": floor}
    metrics = {name: value for name, value in shares.items() if value is not None}
    alarm = only("dead_sequences", dead(0.72), metrics)
    assert alarm.message == f"72% of negative sequences of 4k-8k tokens are dead; {cause}"
    assert alarm.advice == advice and str(alarm) == f"{alarm.message}: {advice}"
    collapse = only("ess_collapse", {"weight/ess": 0.04}, metrics)
    assert cause in collapse.message and collapse.advice == advice


def test_the_worst_kind_of_sequences_with_enough_of_them_is_named():
    metrics = dead(0.6) | {
        "weight/dead_share/positive/8k-16k": 0.8,
        "weight/count/positive/8k-16k": 16.0,
        "weight/dead_share/negative/8k-16k": 1.0,
        "weight/count/negative/8k-16k": 3.0,
        "weight/dead_share/negative": 0.9,  # no kind, it has no count
    }
    assert "80% of positive sequences of 8k-16k" in only("dead_sequences", metrics).message


def test_ess_collapse_names_the_worst_mini_batch():
    metrics = {"weight/ess": 0.04, "weight/ess/mini_batch_0": 0.9, "weight/ess/mini_batch_7": 0.01}
    message = only("ess_collapse", metrics).message
    assert "4.0% of the samples" in message and message.endswith("; mini-batch 7 is the worst")
    assert "worst" not in only("ess_collapse", {"weight/ess": 0.04}).message


WIDER_BOUNDS = "use --routing-replay R3, the same precision in engine and trainer, or wider --mismatch-bounds"


def test_what_a_correction_rejects_is_not_blamed_on_log_w():
    """`recomputed`, whose log W has no mismatch: staleness would be blamed for all of it."""
    blamed = {"ratio/mismatch_share": 0.0, "mismatch/dead_share": 0.9}
    alarm = only("dead_sequences", dead(0.72), blamed)
    assert alarm.message.endswith("tokens are dead; --mismatch-correction alone kills 90% of the dead")
    assert alarm.advice == WIDER_BOUNDS
    half = only("dead_sequences", dead(0.72), blamed, {"mismatch/dead_share": 0.4})
    assert half.advice == FEWER_STEPS
    # few effective samples although most of them live: then the dead are not why
    for dead_share, advice in ((0.95, WIDER_BOUNDS), (0.02, FEWER_STEPS)):
        metrics = blamed | {"weight/ess": 0.04, "weight/dead_share": dead_share}
        assert only("ess_collapse", metrics).advice == advice


@pytest.mark.parametrize(("start", "quiet", "loud"), [(0.2, 0.69, 0.71), (2.0, 3.9, 4.1)])
def test_entropy_explosion_is_twice_the_start_and_half_a_nat(start, quiet, loud):
    # later batches do not move what it is compared with
    before = history(5, train__entropy=start) + history(9, train__entropy=quiet)
    assert check({"train/entropy": quiet}, before) == []
    alarm = only("entropy_explosion", {"train/entropy": loud}, before=before)
    assert f"{loud / start:.1f} times" in alarm.message


# Gradient


def gradient(norm: float, **parts: float) -> dict[str, float]:
    quiet = {"router": 0.1, "experts": 0.9, "first_third": 0.7, "last_third": 0.7}
    return {"train/grad_norm_max": norm} | {f"gradient/{x}": value for x, value in (quiet | parts).items()}


def test_a_gradient_spike_names_the_part_that_grew():
    before = [gradient(1.0)] * 10
    alarm = only("gradient_spike", gradient(6.0, router=5.5, experts=2.0, last_third=5.9), before=before)
    assert alarm.message == (
        "a gradient norm of 6 is 6.0 times the usual 1, most of it in router and the last third of the layers"
    )
    assert "--routing-replay" in alarm.advice
    # a part that had no gradient before
    alarm = only("gradient_spike", gradient(6.0, attention=5.5, experts=2.0, last_third=5.9), before=before)
    assert "most of it in attention" in alarm.message and "--routing-replay" not in alarm.advice


def test_a_spike_is_measured_against_the_last_batches_and_not_moved_by_another_spike():
    before = history(30, train__grad_norm_max=10.0) + history(20, train__grad_norm_max=1.0)
    before[-1]["train/grad_norm_max"] = 100.0
    assert "the usual 1" in only("gradient_spike", {"train/grad_norm_max": 6.0}, before=before).message


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
    alarm = only("engine_mismatch", metrics)
    assert "sigma 0.03 a token" in alarm.message and "8,192 tokens by 2.7" in alarm.message
    assert alarm.advice.startswith(advice) and "--routing-replay R3" in alarm.advice
    assert check(metrics | {"response/length_p90": 1024.0}, []) == []
    assert check(metrics | {"ratio/engine_token_sigma": 0.01}, []) == []
    noisy = only("engine_mismatch", metrics, {"ratio/floor_token_sigma": 0.027 * 2**0.5}).advice
    assert "the trainer's own rounding explains 81% of it: " in noisy and "recomputed" not in noisy
    assert only("engine_mismatch", metrics, {"ratio/floor_token_sigma": 0.02}).advice == alarm.advice
    old = only("engine_mismatch", metrics, {"staleness/asynchronous_mean": 2.25}).advice
    assert old.startswith("samples are 2.2 steps old, which is in it unless --old-policy snapshot; ")


@pytest.mark.parametrize(
    ("spread", "dead_share"), [(0.03 * 2048**0.5, 0.21), (0.01 * 8192**0.5, 0.04), (LOG_W_SPREAD, 0.23)]
)
def test_the_bound_of_the_spread_is_where_a_fifth_of_the_negatives_is_dead(spread, dead_share):
    """phi(W) of A < 0 under log W ~ N(-spread^2 / 2, spread^2), for which E[W] = 1."""
    log_w = np.random.default_rng(0).normal(-(spread**2) / 2, spread, 200_000)
    phi = np.exp(3 * log_w + 2 * (1 - np.exp(log_w)))
    assert (phi < 0.01).mean() == pytest.approx(dead_share, abs=0.01)


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        ([0.2] * 5 + [0.8] * 5 + [0.3] * 5, ""),
        ([0.2] * 5 + [0.8] * 5 + [0.5] * 5, None),
        ([0.2] * 5 + [0.8] * 5 + [0.0], None),  # one bad batch
        ([0.8] * 5 + [0.0] * 4, ""),  # means of five count from the first on
        ([0.8, 0.0, 0.0], None),
        ([0.0] * 20, None),
        ([-1.0] * 5 + [-1.4] * 5, None),
        ([-1.0] * 5 + [-1.6] * 5, ""),
        ([0.8] * 10 + [NAN], None),
        ([0.8] * 5 + [0.2] * 5, "fell to 0.2, the best was 0.8"),
    ],
)
def test_reward_collapse(rewards, told):
    batches = [{"reward/mean": reward} for reward in rewards]
    alarms = check(batches[-1], batches[:-1])
    assert [alarm.name for alarm in alarms] == ["reward_collapse"] * (told is not None)
    assert not alarms or told in alarms[0].message


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


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1.0] * 5 + [0.2] * 5, False),  # it comes closer
        ([1.0] * 5 + [0.2] * 5 + [0.39] * 5, False),  # not twice the lowest
        ([0.5] * 5 + [0.01] * 5 + [0.1] * 5, False),  # less than 0.1 nats above it
        ([1.0] * 5 + [0.2] * 5 + [0.5] * 5, True),
        ([0.2] * 5 + [0.42] * 4, False),  # the mean of five batches counts
        ([0.2] * 5 + [NAN] * 9 + [0.9] * 5, True),
        ([0.2] * 5 + [0.9] * 4 + [NAN], False),
        ([0.2, 0.2, 5.0], False),
    ],
)
def test_a_policy_that_leaves_its_teacher(values, told):
    before = [{"distillation/reverse_kl": value} for value in values]
    alarms = check(before.pop(), before)
    assert [alarm.name for alarm in alarms] == ["distillation_diverges"] * told
    if told:
        assert "of 5 batches rose" in str(alarms[0])


def test_groups_of_equal_rewards_learn_from_a_teacher():
    assert check(FAILING | {"distillation/reverse_kl": 0.3}, []) == []
