"""What the reward function sees of a response, and what becomes of its results."""

import numpy as np
import pytest

from megatron_vespo.rewards.loading import load_reward_function
from megatron_vespo.rewards.pool import RewardItem, RewardPool, RewardResult
from megatron_vespo.rollout.scoring import Scorer, check_some_worked, reward_statuses, score_and_report
from megatron_vespo.types import Completion, Prompt, Segments

LONGEST = 20
TURNS = (("policy", "look it up"), ("tool", "7"), ("policy", "it is 8"))


class Characters:
    def batch_decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(map(chr, ids)) for ids in tokens]


class Rewards:
    """Records what is asked, and answers with `result`."""

    def __init__(self, result: RewardResult | None = None):
        self.result, self.items = result or RewardResult(0.5, "ok", ""), []

    def score(self, items: list[RewardItem]) -> list[RewardResult]:
        self.items += items
        return [self.result if item.ended else RewardResult(0.0, "ok", "cut") for item in items]


def response(*spans: tuple[str, str], finish_reason: str = "stop", **fields) -> Completion:
    segments = Segments(tuple(writer for writer, _ in spans), tuple(len(text) for _, text in spans))
    n = segments.num_sampled
    return Completion(
        Prompt(0, [1], "7", "question", {"level": 2, "turns": "a column"}),
        [ord(letter) for _, text in spans for letter in text], np.zeros(n, np.float32), [0] * n, None,
        finish_reason, 1.0, segments=segments if len(spans) > 1 else None, **fields,
    )  # fmt: skip


def scorer(rewards, turn_rewards="sum", buffer=0) -> Scorer:
    return Scorer(Characters(), rewards, LONGEST, buffer, 1.0, turn_rewards)


def test_a_response_of_one_turn_is_handed_over_as_it_is():
    rewards, one = Rewards(), response(("policy", "it is 7"))
    assert scorer(rewards).score([one]) == []
    assert rewards.items == [RewardItem("it is 7", "7", {"level": 2, "turns": "a column"}, True)]
    assert (one.reward, one.reward_status, one.reward_parts) == (0.5, "ok", {})


def test_what_a_tool_wrote_never_reaches_the_response():
    rewards = Rewards()
    scorer(rewards).score(
        [response(*TURNS), response(*TURNS[:2]), response(*TURNS, reward_data={"level": 3, "calls": [1]})]
    )
    said = [{"writer": writer, "text": text} for writer, text in TURNS]
    assert [item.response for item in rewards.items] == ["it is 8", "look it up", "it is 8"]
    assert [item.metadata for item in rewards.items] == [
        {"level": 2, "turns": said},
        {"level": 2, "turns": said[:2]},
        {"level": 3, "calls": [1], "turns": said},
    ]


def test_the_prompts_metadata_stays_what_it_was():
    one = response(*TURNS, reward_data={"level": 3})
    scorer(Rewards()).score([one])
    assert one.prompt.metadata == {"level": 2, "turns": "a column"}


@pytest.mark.parametrize(
    ("function", "many"), [("run_rewards:first_letters", False), ("async_rewards:judge", True)]
)
def test_asynchronous_functions_score_many_groups_at_once(function, many):
    pool = RewardPool(load_reward_function(f"tests.support.{function}"), num_workers=1, timeout_s=1.0)
    assert (scorer(pool).groups_at_once > 8) == many
    assert scorer(None).groups_at_once == 1
    pool.close()


def test_only_the_length_limit_cuts_a_response():
    rewards = Rewards()
    batch = [response(*TURNS, finish_reason=reason) for reason in ("stop", "length", "turns")]
    scorer(rewards).score(batch)
    assert [item.ended for item in rewards.items] == [True, False, True]
    assert len(reward_statuses(batch)) == 2


def test_parts_of_a_reward_and_of_the_environment():
    result = RewardResult(0.5, "ok", "", {"form": 1.0})
    plain, played = response(*TURNS), response(*TURNS, turn_rewards=(0.25, 0.5))
    scorer(Rewards(result)).score([plain, played])
    assert plain.reward_parts == {"form": 1.0}
    assert (played.reward, played.reward_parts) == (0.5, {"form": 1.0, "turns": 0.75})
    scorer(Rewards(result), "last").score([played])
    assert played.reward_parts == {"form": 1.0, "turns": 0.5}


@pytest.mark.parametrize(("turn_rewards", "rewards"), [("sum", [0.75, 0.0, 0.75]), ("last", [0.5, 0.0, 0.5])])
def test_without_a_function_the_environment_rewards(turn_rewards, rewards):
    batch = [
        response(*TURNS, turn_rewards=(0.25, 0.5)),
        response(*TURNS),
        response(*TURNS, turn_rewards=(0.25, 0.5), finish_reason="length"),
    ]
    assert scorer(None, turn_rewards).score(batch) == []
    assert [one.reward for one in batch] == rewards
    assert all(one.reward_parts == {} for one in batch)


@pytest.mark.parametrize("with_function", [True, False])
def test_a_failed_environment_earns_nothing_and_is_not_judged(with_function):
    rewards = Rewards() if with_function else None
    failed = response(*TURNS, turn_rewards=(0.25,), environment_error="step: KeyError: 'x'")
    good = response(*TURNS, turn_rewards=(0.5,))
    results = scorer(rewards).score([failed, good])
    assert results == [RewardResult(0.0, "error", "the environment failed: step: KeyError: 'x'")]
    assert (failed.reward, failed.reward_status, good.reward) == (0.0, "error", 0.5)
    assert (failed.reward_error, good.reward_error) == (results[0].detail, "")
    assert rewards is None or len(rewards.items) == 1
    lines = []
    with pytest.raises(RuntimeError, match="all 1 rewards of a batch failed: .*the environment failed"):
        score_and_report(scorer(rewards), [failed], lines.append)
    check_some_worked(reward_statuses([failed, good]))


def test_the_length_penalty_counts_sampled_tokens():
    # 17 sampled tokens of 22, the penalty begins after 10 and is complete at 20
    spans = (("policy", "x" * 10), ("tool", "y" * 5), ("policy", "z" * 7))
    long, short = response(*spans), response(("policy", "x" * 10), ("tool", "y" * 10))
    scorer(Rewards(), buffer=10).score([long, short])
    assert (long.overlong_penalty, short.overlong_penalty) == (pytest.approx(-0.7), 0.0)
