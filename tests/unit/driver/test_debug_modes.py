"""--save-rollouts, --train-from, --rollout-only: their flags, and their loops with stand-ins for the rest."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.data.rollout_file import batch_path, read_record
from megatron_vespo.driver.controller import Controller
from megatron_vespo.driver.debug_modes import (
    Recorder,
    Replay,
    RolloutOnly,
    check_modes,
    check_recorded,
)
from megatron_vespo.driver.training_samples import training_samples
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.types import Completion, Prompt, RunState, SamplingParams
from tests.support.builders import make_completion, make_prompt
from tests.support.controllers import EngineSync

BATCHES, SIZE, GROUP = 3, 4, 2
PROMPTS = [make_prompt(i, [1, 2, i]) for i in range(5)]


def arguments(**changes) -> Namespace:
    args = Namespace(
        train_iters=2 * BATCHES,
        steps_per_rollout=2,
        rollout_batch_size=SIZE,
        group_size=GROUP,
        max_completion_tokens=3,
        advantage_estimator="group-mean",
        dynamic_sampling=False,
        dynamic_sampling_max_batches=10,
        overlong_buffer=2,
        overlong_penalty=1.0,
        ratio_denominator="recomputed",
        old_policy="current",
        max_logprob_difference=None,
        routing_replay="R3",
        eval_interval=5,
        eval_completions=1,
        eval_temperature=None,
        eval_pass_reward=1.0,
        eval_data=None,
        save=None,
        load=None,
        save_interval=1000,
        on_alarm="warn",
        seed=0,
        vocab_size=9,
        num_layers=1,
        hidden_size=8,
        num_experts=4,
        moe_router_topk=2,
        save_rollouts=None,
        ckpt_step=None,
        train_from=None,
        rollout_only=False,
    )
    assert not changes.keys() - vars(args).keys()
    vars(args).update(changes)
    return args


class Engines:
    """Answers by seed and prompt alone, as weights of `state`'s iteration, or always of version 0."""

    def __init__(self, state: RunState | None):
        self._state, self.seeds = state, []

    def collect(self, prompts, sampling, *, num_completions, seed, for_training=True):
        self.seeds.append(seed)
        return [[self._completion(prompt, [seed, i]) for i in range(num_completions)] for prompt in prompts]

    def _completion(self, prompt: Prompt, seed: list[int]) -> Completion:
        draw = np.random.default_rng([*seed, prompt.prompt_id])
        length = int(draw.integers(1, 4))
        version = self._state.iteration if self._state else 0
        routes = draw.integers(0, 4, (len(prompt.token_ids) + length - 1, 1, 2)).astype(np.uint8)
        log_probs = -draw.random(length).astype(np.float32)
        return make_completion(prompt, length, version, log_probs=log_probs, routed_experts=routes)


class Rewards:
    def score(self, items: list) -> list[RewardResult]:
        return [RewardResult(float(i % 3 == 0), "ok", "") for i in range(len(items))]


class Metrics:
    def __init__(self):
        self.records: list[tuple[int, dict]] = []

    def write(self, step: int, metrics: dict) -> None:
        self.records.append((step, metrics))


class Tokenizer:
    def batch_decode(self, token_ids, skip_special_tokens):
        return [""] * len(token_ids)


def recording(args: Namespace, mode: type[Controller] = Controller, iteration: int = 0) -> Controller:
    """Engines and rewards, no trainer."""
    state = RunState(iteration=iteration, consumed_prompts=iteration // 2 * SIZE)
    return mode(
        args=args,
        trainer=None,
        collector=Engines(None if mode is RolloutOnly else state),
        scorer=Scorer(
            Tokenizer(), Rewards(), args.max_completion_tokens, args.overlong_buffer, args.overlong_penalty
        ),
        cursor=PromptCursor(PROMPTS, 0, state.consumed_prompts),
        eval_prompts=[],
        sampling=SamplingParams(1.0, 3, ()),
        display=RunDisplay("test", args.train_iters),
        engine_sync=EngineSync(),
        metrics=Metrics(),
        state=state,
        record=Recorder(args, iteration),
        policy_version=iteration,
    )


def replaying(args: Namespace) -> Replay:
    nothing = dict.fromkeys(("engine_sync", "trainer", "collector", "scorer", "cursor", "sampling"))
    return Replay(args=args, eval_prompts=[], display=RunDisplay("test", 1), metrics=None, **nothing)


@pytest.fixture()
def recorded(tmp_path) -> Path:
    """Three batches, as weights that change wrote them."""
    run = recording(arguments(save_rollouts=tmp_path / "rollouts"))
    for _ in range(BATCHES):
        run.rollout_batch()
        run.state.iteration += 2
        run.policy_version = run.state.iteration
    return tmp_path / "rollouts"


def test_a_replay_trains_on_the_same_samples(tmp_path):
    live = recording(arguments(save_rollouts=tmp_path))
    replay = replaying(arguments(train_from=tmp_path))
    for _ in range(BATCHES):
        groups, metrics = live.rollout_batch()
        again, metrics_again = replay.rollout_batch()
        assert metrics == metrics_again
        assert replay.state.consumed_prompts == live.state.consumed_prompts
        samples = zip(
            *(training_samples(batch, "group-mean", "R3") for batch in (groups, again)), strict=True
        )
        for one, other in samples:
            assert one.routed_experts is not None
            for name, value in vars(one).items():
                np.testing.assert_array_equal(value, getattr(other, name), strict=True, err_msg=name)
        live.state.iteration += 2
        live.policy_version = live.state.iteration
        replay.state.iteration += 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        batch_path(tmp_path, batch).name for batch in range(BATCHES)
    ]


def test_advantages_are_made_anew(recorded):
    replay = replaying(arguments(train_from=recorded, advantage_estimator="leave-one-out"))
    groups, _ = replay.rollout_batch()
    rewards = [[c.reward + c.overlong_penalty for c in group] for group in groups]
    expected = [own - other for a, b in rewards for own, other in ((a, b), (b, a))]
    assert [sample.advantage for sample in training_samples(groups, "leave-one-out", None)] == pytest.approx(
        expected
    )


def test_a_resumed_recording_goes_on(recorded):
    stale = batch_path(recorded, 1).read_bytes()
    run = recording(arguments(save_rollouts=recorded, load="checkpoint"), iteration=2)
    run.rollout_batch()
    assert batch_path(recorded, 1).read_bytes() == stale  # the same batch, in its old place
    assert read_record(batch_path(recorded, 1)).consumed_prompts == 2 * SIZE


def test_a_recording_that_goes_back_sets_later_batches_aside(recorded):
    earlier, later = batch_path(recorded, 0).read_bytes(), batch_path(recorded, 2).read_bytes()
    run = recording(arguments(save_rollouts=recorded, load="checkpoint", ckpt_step=2), iteration=2)
    for _ in range(2):
        run.rollout_batch()
    assert batch_path(recorded, 0).read_bytes() == earlier
    aside = recorded / "set-aside-001"
    assert sorted(aside.iterdir()) == [batch_path(aside, 1), batch_path(aside, 2)]
    assert batch_path(aside, 2).read_bytes() == later
    assert batch_path(recorded, 1).is_file() and not (recorded / "set-aside-002").exists()


def test_rollout_only_runs_through_without_a_trainer(tmp_path):
    args = arguments(rollout_only=True, save_rollouts=tmp_path / "rollouts", save="never")
    run = recording(args, RolloutOnly)
    assert run.train().iteration == 2 * BATCHES
    assert len(set(run.collector.seeds)) == BATCHES
    records = run.metrics.records
    assert [(step, metrics["policy/version"]) for step, metrics in records] == [(2, 0), (4, 0), (6, 0)]
    assert all("rollout/tokens_per_second" in metrics for _, metrics in records)
    assert not any(name.startswith("train/") for _, metrics in records for name in metrics)
    check_recorded(arguments(train_from=tmp_path / "rollouts"), 0)


@pytest.mark.parametrize("eval_prompts", [None, {"eval/accuracy": 0.25}])
def test_the_display_is_told_the_last_evaluation_before_the_first_batch(eval_prompts):
    run, told = recording(arguments(rollout_only=True), RolloutOnly), []
    run.state.eval_before = run.state.eval_after = eval_prompts
    run.record, run.display.recall = None, told.append
    run.train()
    assert told == [eval_prompts] * (eval_prompts is not None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_from": "r", "rollout_only": True},
         "--train-from starts no engines, --rollout-only needs them: leave one out"),
        ({"train_from": "r", "save_rollouts": Path("s")},
         "--train-from starts no engines, --save-rollouts needs them: leave one out"),
        ({"train_from": "r", "eval_data": Path("h")},
         "--train-from starts no engines, --eval-data needs them: leave one out"),
        ({"rollout_only": True, "load": "c"},
         "--rollout-only has no trainer, the weights are --hf-checkpoint's: leave --load out"),
        ({"rollout_only": True, "save": "c"},
         "--rollout-only has no trainer, the weights are --hf-checkpoint's: leave --save out"),
    ],
)  # fmt: skip
def test_contradictions(flags, message):
    with pytest.raises(ValueError) as error:
        check_modes(arguments(**flags))
    assert str(error.value) == message


def test_what_may_be_recorded_where(recorded):
    check_modes(arguments())
    check_modes(arguments(rollout_only=True))
    check_modes(arguments(save_rollouts=recorded / "other"))
    check_modes(arguments(save_rollouts=recorded, load="checkpoint"))
    with pytest.raises(ValueError, match="has recorded batches: name another folder$"):
        check_modes(arguments(save_rollouts=recorded))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_rollout": 1}, "--train-iters 6 at --steps-per-rollout 1 needs "
                              "batches 0 to 5"),
        ({"train_iters": 8}, "batch-000003.npz is missing; --train-iters 8 at --steps-per-rollout 2 needs "
                             "batches 0 to 3"),
        ({"steps_per_rollout": 3}, "was recorded with --steps-per-rollout 2, this run has 3"),
        ({"group_size": 4}, "batch-000000.npz was recorded with --group-size 2, this run has 4"),
        ({"rollout_batch_size": 8}, "was recorded with --rollout-batch-size 4, this run has 8"),
        ({"num_layers": 2}, "batch-000000.npz was recorded with number of layers 1, this run has 2"),
        ({"num_experts": None}, "was recorded with number of experts 4, this run has None"),
    ],
)  # fmt: skip
def test_batches_of_another_run(recorded, changes, message):
    check_modes(arguments(train_from=recorded))
    with pytest.raises(ValueError) as error:
        check_modes(arguments(train_from=recorded, **changes))
    assert str(recorded) in str(error.value) and str(error.value).endswith(message)


def test_a_resumed_replay_needs_the_rest_only(recorded):
    batch_path(recorded, 0).unlink()
    check_modes(arguments(train_from=recorded, load="checkpoint"))
    check_recorded(arguments(train_from=recorded), 2)
    with pytest.raises(ValueError, match="batch-000000.npz is missing"):
        check_recorded(arguments(train_from=recorded), 0)
    with pytest.raises(ValueError, match="none: no such folder"):
        check_recorded(arguments(train_from=recorded / "none"), 0)
