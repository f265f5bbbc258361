"""Dynamic sampling: what a rollout batch keeps, and the source that fills it, against fakes."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.driver.training_samples import training_samples
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.batch_source import SourceState
from megatron_vespo.rollout.dynamic_sampling import RolloutBatch
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.rollout.synchronous_batches import SynchronousBatches
from megatron_vespo.system.preemption import Preemption
from megatron_vespo.types import Completion, Prompt, SamplingParams, VersionSpans
from tests.support.builders import make_completion, make_prompt
from tests.support.controllers import Tokenizer

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


@pytest.mark.parametrize(
    ("cap", "varied", "rounds", "kept", "counts"),
    [
        # half of them were kept, so four more should bring the two that are missing
        (40, "+--+ -+-+", [4, 4], [0, 3, 5, 7], (8, 4, 0, 0)),
        # one is missing; at three of four, 4 / 3 prompts bring it, and the surplus is dropped
        (40, "+++- ++", [4, 2], [0, 1, 2, 4], (6, 1, 1, 0)),
        # the cap fills the batch with what there is
        (10, "---- -+-- --", [4, 4, 2], [0, 1, 2, 5], (10, 6, 0, 3)),
        # without dynamic sampling everything is taken as it comes
        (4, "-+-+", [4], [0, 1, 2, 3], (4, 0, 0, 2)),
    ],
)
def test_groups_without_variance_are_replaced(cap, varied, rounds, kept, counts):
    batch, found = filled(4, cap, [sign == "+" for sign in varied.replace(" ", "")])
    assert (found, ids(batch.groups())) == (rounds, kept)
    names = ("generated_prompts", "filtered_groups", "surplus_groups", "shortfall_groups")
    assert batch.metrics() == {f"rollout/{n}": float(c) for n, c in zip(names, counts, strict=True)}


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

    def progress(self, done: int, total: int) -> None:
        pass

    def message(self, text):
        self.messages.append(text)


class Engines:
    """Completions of lengths 1 to LONGEST, marked with the seed of their round."""

    def __init__(self):
        self.seeds, self.version = [], 0

    def collect(self, prompts, sampling, *, num_completions, seed):
        self.seeds.append(seed)
        groups = [[completion(p, length=1 + i * 7 // 3, seed=seed) for i in range(N)] for p in prompts]
        for member in (c for group in groups for c in group):
            member.policy_versions = VersionSpans.single(self.version, len(member.token_ids))
        return groups


class Rewards:
    """The first completion of prompts that `every` divides is right, all others are wrong."""

    def __init__(self, every: int):
        self.every = every

    def score(self, items):
        right = [int(item.answer) % self.every == 0 and i % N == 0 for i, item in enumerate(items)]
        return [RewardResult(float(r), "ok", "") for r in right]


class Source(SynchronousBatches):
    """Its parts are at hand."""

    def __init__(self, every: int = 3, consumed: int = 0, penalty: tuple[int, float] = (0, 1.0), **changes):
        self.engines, self.display = Engines(), Display()
        self.cursor = PromptCursor(PROMPTS, 5, consumed)
        scorer = Scorer(Tokenizer(), Rewards(every), LONGEST, *penalty)
        super().__init__(
            Generation(self.engines, self.cursor, SamplingParams(1.0, LONGEST, ()), scorer),
            **{"batch_size": 4, "group_size": N, "max_batches": 5, "seed": 5} | changes,
            advantage_estimator="group-mean", display=self.display, preemption=Preemption(),
        )  # fmt: skip


def test_batches_are_groups_with_variance_only():
    source = Source()
    batch = source.next_batch(0)
    groups, metrics = batch.groups, batch.metrics
    assert len(groups) == 4 and all(prompt_id % 3 == 0 for prompt_id in ids(groups))
    samples = training_samples(groups, "group-mean", None)
    assert len(samples) == 16 and all(sample.advantage != 0 for sample in samples)
    generated = int(metrics["rollout/generated_prompts"])
    assert batch.consumed_prompts == source.cursor.consumed == generated > 4
    assert source.state() == SourceState(generated)
    # of everything generated, or a filter of half-solved prompts would pass for the policy's accuracy
    solved = sum(p.prompt_id % 3 == 0 for p in PromptCursor(PROMPTS, 5).take(generated))
    assert metrics["reward/mean"] == pytest.approx(solved / generated / N)
    assert metrics["rollout/zero_advantage_share"] == pytest.approx(1 - solved / generated)
    assert metrics["rollout/tokens"] == generated * sum(1 + i * 7 // 3 for i in range(N))
    assert source.display.messages == []


def test_every_round_draws_its_own_samples():
    """A small prompt file comes round again within one batch: the same seed would repeat its completions."""
    source = Source(every=1000, max_batches=20)
    assert source.next_batch(0).consumed_prompts == 80 > len(PROMPTS)
    seeds = source.engines.seeds
    assert len(set(seeds)) == len(seeds) == 20
    assert seeds[0] == 5 + 1  # the first round's is that of a run without dynamic sampling


def test_the_cap_is_said():
    source = Source(every=1000)
    batch = source.next_batch(0)
    left = int(batch.metrics["rollout/shortfall_groups"])
    assert len(batch.groups) == 4 and left >= 3
    [message] = source.display.messages
    assert message == (
        f"dynamic sampling: 20 prompts gave {4 - left} groups of different rewards; {left} without fill the "
        "batch of 4"
    )


def test_a_resumed_run_goes_on_with_the_same_prompts_and_seeds():
    whole = Source()
    consumed = whole.next_batch(0).consumed_prompts
    whole.engines.version = 2
    whole.weights_synced(2)
    expected = whole.next_batch(2)
    resumed = Source(consumed=consumed)
    resumed.engines.version = 2
    resumed.weights_synced(2)
    actual = resumed.next_batch(2)
    assert ids(actual.groups) == ids(expected.groups)
    tokens = [[c.token_ids.tolist() for group in batch.groups for c in group] for batch in (actual, expected)]
    assert tokens[0] == tokens[1]
    assert actual.consumed_prompts == expected.consumed_prompts


def test_another_policy_than_the_current_one_is_an_error():
    source = Source()
    source.engines.version = 2
    with pytest.raises(RuntimeError, match=r"was answered by policy versions \[2\], the current one is 0$"):
        source.next_batch(0)


def test_without_the_flag_the_batch_is_the_next_prompts():
    source = Source(max_batches=None)
    batch = source.next_batch(0)
    assert ids(batch.groups) == [p.prompt_id for p in PromptCursor(PROMPTS, 5).take(4)]
    assert source.engines.seeds == [6] and "rollout/generated_prompts" not in batch.metrics


def test_the_overlong_penalty_moves_advantages_not_rewards():
    batch = Source(max_batches=None, penalty=(4, 0.5)).next_batch(0)
    groups, metrics = batch.groups, batch.metrics
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
    metrics = Source(every=1000, penalty=(4, 1.0)).next_batch(0).metrics
    assert metrics["rollout/generated_prompts"] == 20 and metrics["rollout/shortfall_groups"] >= 3
