"""Dynamic sampling: what a rollout batch keeps, and the controller that fills it, against fakes."""

from __future__ import annotations

from argparse import Namespace
from contextlib import contextmanager

import numpy as np
import pytest

from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.driver.controller import Controller
from megatron_vespo.driver.training_samples import training_samples
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.dynamic_sampling import RolloutBatch
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.types import Completion, Prompt, RunState, SamplingParams
from tests.support.builders import make_completion, make_prompt

N = 4  # completions a prompt
LONGEST = 8
PROMPTS = [make_prompt(i, [1, 2], answer=str(i)) for i in range(40)]


def completion(prompt: Prompt, reward: float | None = None, length: int = 3, seed: int = 0) -> Completion:
    reason = "length" if length == LONGEST else "stop"
    return make_completion(prompt, [seed % 2**16] * length, 0, reason, reward=reward)


def group(prompt_id: int, varied: bool) -> list[Completion]:
    return [completion(PROMPTS[prompt_id], float(varied and i == 0)) for i in range(N)]


def ids(groups) -> list[int]:
    return [members[0].prompt.prompt_id for members in groups]


def filled(size: int, max_prompts: int, varied: list[bool]) -> tuple[RolloutBatch, list[int]]:
    """The batch when prompt i's group has variance or not, and the sizes of its rounds."""
    batch, rounds, start = RolloutBatch(size, max_prompts), [], 0
    while wanted := batch.num_wanted():
        batch.add([group(i, varied[i]) for i in range(start, start + wanted)])
        rounds.append(wanted)
        start += wanted
    return batch, rounds


def test_groups_without_variance_are_replaced():
    batch, rounds = filled(4, 40, [True, False, False, True] + [False, True, False, True])
    # half of them were kept, so four more should bring the two that are missing
    assert rounds == [4, 4]
    assert ids(batch.groups()) == [0, 3, 5, 7]
    assert batch.metrics() == {
        "rollout/generated_prompts": 8.0,
        "rollout/filtered_groups": 4.0,
        "rollout/surplus_groups": 0.0,
        "rollout/shortfall_groups": 0.0,
    }


def test_surplus_is_dropped_and_counted():
    batch, rounds = filled(4, 40, [True, True, True, False] + [True, True])
    assert rounds == [4, 2]  # one is missing; at three of four, 4 / 3 prompts bring it
    assert ids(batch.groups()) == [0, 1, 2, 4]
    assert batch.metrics()["rollout/surplus_groups"] == 1.0
    assert batch.metrics()["rollout/filtered_groups"] == 1.0


def test_the_cap_fills_the_batch_with_what_there_is():
    batch, rounds = filled(4, 10, [False] * 5 + [True] + [False] * 4)
    assert rounds == [4, 4, 2]
    assert ids(batch.groups()) == [0, 1, 2, 5]
    assert batch.metrics() == {
        "rollout/generated_prompts": 10.0,
        "rollout/filtered_groups": 6.0,
        "rollout/surplus_groups": 0.0,
        "rollout/shortfall_groups": 3.0,
    }


def test_without_dynamic_sampling_everything_is_taken_as_it_comes():
    batch, rounds = filled(4, 4, [False, True, False, True])
    assert rounds == [4] and ids(batch.groups()) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_every_group_is_accounted_for(seed):
    draw = np.random.default_rng(seed)
    size, max_batches = int(draw.integers(1, 8)), int(draw.integers(1, 5))
    varied = (draw.random(size * max_batches) < draw.random()).tolist()
    batch, rounds = filled(size, size * max_batches, varied)
    metrics = batch.metrics()
    assert sum(rounds) == metrics["rollout/generated_prompts"] <= size * max_batches
    assert len(batch.groups()) == size
    left_out = metrics["rollout/filtered_groups"] + metrics["rollout/surplus_groups"]
    assert size + left_out == metrics["rollout/generated_prompts"]
    kept = [varied[i] for i in ids(batch.groups())]
    assert kept.count(False) == metrics["rollout/shortfall_groups"]
    assert ids(batch.groups()) == sorted(ids(batch.groups()))


class Display:
    def __init__(self):
        self.messages = []

    @contextmanager
    def phase(self, name):
        yield

    def message(self, text):
        self.messages.append(text)


class Engines:
    """Completions of lengths 1 to LONGEST, marked with the seed of their round."""

    def __init__(self):
        self.seeds = []

    def collect(self, prompts, sampling, *, num_completions, seed):
        self.seeds.append(seed)
        return [[completion(p, length=1 + i * 7 // 3, seed=seed) for i in range(N)] for p in prompts]


class Rewards:
    """The first completion of prompts that `every` divides is right, all others are wrong."""

    def __init__(self, every: int):
        self.every = every

    def score(self, items):
        right = [int(item.answer) % self.every == 0 and i % N == 0 for i, item in enumerate(items)]
        return [RewardResult(float(r), "ok", "") for r in right]


class Tokenizer:
    def batch_decode(self, token_ids, skip_special_tokens):
        return [""] * len(token_ids)


def controller(every: int = 3, consumed: int = 0, iteration: int = 0, **flags) -> Controller:
    args = Namespace(
        rollout_batch_size=4,
        group_size=N,
        max_completion_tokens=LONGEST,
        dynamic_sampling=True,
        dynamic_sampling_max_batches=5,
        overlong_buffer=0,
        overlong_penalty=1.0,
        advantage_estimator="group-mean",
        routing_replay=None,
        seed=5,
    )
    vars(args).update(flags)
    return Controller(
        args=args,
        trainer=None,
        collector=Engines(),
        scorer=Scorer(
            Tokenizer(),
            Rewards(every),
            args.max_completion_tokens,
            args.overlong_buffer,
            args.overlong_penalty,
        ),
        cursor=PromptCursor(PROMPTS, args.seed, consumed),
        eval_prompts=[],
        sampling=SamplingParams(1.0, LONGEST, ()),
        display=Display(),
        engine_sync=None,
        metrics=None,
        state=RunState(iteration=iteration, consumed_prompts=consumed),
        policy_version=iteration,
    )


def test_the_controller_trains_on_groups_with_variance_only():
    run = controller()
    groups, metrics = run.rollout_batch()
    assert len(groups) == 4 and all(prompt_id % 3 == 0 for prompt_id in ids(groups))
    samples = training_samples(groups, "group-mean", None)
    assert len(samples) == 16 and all(sample.advantage != 0 for sample in samples)
    generated = int(metrics["rollout/generated_prompts"])
    assert run.state.consumed_prompts == run.cursor.consumed == generated > 4
    # of everything generated, or a filter of half-solved prompts would pass for the policy's accuracy
    solved = sum(p.prompt_id % 3 == 0 for p in PromptCursor(PROMPTS, 5).take(generated))
    assert metrics["reward/mean"] == pytest.approx(solved / generated / N)
    assert metrics["rollout/zero_advantage_share"] == pytest.approx(1 - solved / generated)
    assert metrics["rollout/tokens"] == generated * sum(1 + i * 7 // 3 for i in range(N))
    assert run.display.messages == []


def test_every_round_draws_its_own_samples():
    """A small prompt file comes round again within one batch: the same seed would repeat its completions."""
    run = controller(every=1000, dynamic_sampling_max_batches=20)
    run.rollout_batch()
    assert run.state.consumed_prompts == 80 > len(PROMPTS)
    seeds = run.collector.seeds
    assert len(set(seeds)) == len(seeds) == 20
    assert seeds[0] == 5 + 1  # the first round's is that of a run without dynamic sampling


def test_the_cap_is_said():
    run = controller(every=1000)
    groups, metrics = run.rollout_batch()
    assert len(groups) == 4 and metrics["rollout/shortfall_groups"] >= 3
    [message] = run.display.messages
    left = int(metrics["rollout/shortfall_groups"])
    assert message == (
        f"dynamic sampling: 20 prompts gave {4 - left} groups of different rewards; {left} without fill the "
        "batch of 4"
    )


def test_a_resumed_run_goes_on_with_the_same_prompts_and_seeds():
    whole = controller()
    whole.rollout_batch()
    whole.state.iteration += 2
    version = whole.policy_version = whole.state.iteration
    whole.collector.collect = _of_version(whole.collector.collect, version)
    consumed = whole.state.consumed_prompts
    expected, _ = whole.rollout_batch()
    resumed = controller(consumed=consumed, iteration=version)
    resumed.collector.collect = _of_version(resumed.collector.collect, version)
    actual, _ = resumed.rollout_batch()
    assert ids(actual) == ids(expected)
    assert [c.token_ids for g in actual for c in g] == [c.token_ids for g in expected for c in g]
    assert resumed.state.consumed_prompts == whole.state.consumed_prompts


def _of_version(collect, version):
    def collected(*args, **kwargs):
        groups = collect(*args, **kwargs)
        for member in (c for g in groups for c in g):
            member.policy_versions += version
        return groups

    return collected


def test_without_the_flag_the_batch_is_the_next_prompts():
    run = controller(dynamic_sampling=False)
    groups, metrics = run.rollout_batch()
    assert ids(groups) == [p.prompt_id for p in PromptCursor(PROMPTS, 5).take(4)]
    assert run.collector.seeds == [6] and "rollout/generated_prompts" not in metrics


def test_the_overlong_penalty_moves_advantages_not_rewards():
    run = controller(dynamic_sampling=False, overlong_buffer=4, overlong_penalty=0.5)
    groups, metrics = run.rollout_batch()
    # lengths 1, 3, 5, 8 of at most 8: the last two are 1 into the buffer, and truncated
    for members in groups:
        assert [member.overlong_penalty for member in members] == [0.0, 0.0, -0.125, -0.5]
    assert metrics["reward/overlong_penalty_mean"] == pytest.approx(-0.625 / 4)
    right = sum(prompt_id % 3 == 0 for prompt_id in ids(groups))
    assert metrics["reward/mean"] == right / 16
    assert metrics["rollout/zero_advantage_share"] == 0.0
    samples = training_samples(groups, "group-mean", None)
    for g, prompt_id in enumerate(ids(groups)):
        reward = [float(prompt_id % 3 == 0), 0.0, 0.0, 0.0]
        used = np.array(reward) + [0.0, 0.0, -0.125, -0.5]
        of_group = samples[4 * g : 4 * g + 4]
        assert [sample.reward for sample in of_group] == reward
        assert [sample.advantage for sample in of_group] == pytest.approx(used - used.mean())


def test_the_penalty_alone_does_not_pass_the_filter():
    run = controller(every=1000, overlong_buffer=4)
    groups, metrics = run.rollout_batch()
    assert metrics["rollout/generated_prompts"] == 20 and metrics["rollout/shortfall_groups"] >= 3
