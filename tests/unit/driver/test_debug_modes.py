"""--save-rollouts, --train-from, --rollout-only: their flags, and their loops with stand-ins for the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.data.rollout_file import batch_path, read_record
from megatron_vespo.driver.controller import Controller
from megatron_vespo.driver.debug_modes import NullLearner, Recorder, check_modes, check_recorded
from megatron_vespo.driver.learner import LogProbBound
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.driver.training_samples import training_samples
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.batch_source import ScoredBatch, SourceState
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.recorded_batches import RecordedBatches
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.rollout.synchronous_batches import SynchronousBatches
from megatron_vespo.system.preemption import Preemption
from megatron_vespo.types import Completion, Prompt, SamplingParams
from tests.support.builders import make_completion, make_prompt
from tests.support.controllers import FLAGS, EngineSync, Tokenizer
from tests.support.refusals import check_refusal
from tests.support.settings import flat_settings

BATCHES, SIZE, GROUP = 3, 4, 2
PROMPTS = [make_prompt(i, [1, 2, i]) for i in range(5)]
SAMPLING = SamplingParams(1.0, 3, ())


def arguments(**changes) -> flat_settings:
    flags = FLAGS | dict(
        train_iters=2 * BATCHES,
        rollout_batch_size=SIZE,
        group_size=GROUP,
        overlong_buffer=2,
        routing_replay="R3",
        eval_data=None,
        save=None,
        load=None,
        vocab_size=9,
        num_layers=1,
        hidden_size=8,
        num_experts=4,
        moe_router_topk=2,
        save_rollouts=None,
        ckpt_step=None,
        train_from=None,
        rollout_only=False,
        record_responses=False,
    )
    assert not changes.keys() - flags.keys()
    return flat_settings(**flags | changes)


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


class Recording:
    """Engines, rewards and files, and optimizer steps that are only counted."""

    def __init__(self, args: flat_settings, iteration: int = 0):
        self.state = RunState(iteration=iteration, consumed_prompts=iteration // 2 * SIZE)
        self.source = synchronous(generation(args, Engines(self.state), self.state), RunDisplay("test", 1))
        self.source.weights_synced(iteration)
        self._record = Recorder(args, iteration, Tokenizer())

    def batch(self) -> ScoredBatch:
        """The next one; two optimizer steps follow it."""
        batch = self.source.next_batch(self.state.iteration)
        self._record(batch)
        self.state.iteration += 2
        self.source.weights_synced(self.state.iteration)
        return batch


def synchronous(generation: Generation, display: RunDisplay) -> SynchronousBatches:
    return SynchronousBatches(
        generation, batch_size=SIZE, group_size=GROUP, max_batches=None, seed=0,
        advantage_estimator="group-mean", display=display, preemption=Preemption(),
    )  # fmt: skip


def generation(args: flat_settings, engines: Engines, state: RunState) -> Generation:
    flags = args.values
    lengths = flags.max_completion_tokens, flags.overlong_buffer, flags.overlong_penalty
    cursor = PromptCursor(PROMPTS, 0, state.consumed_prompts)
    return Generation(engines, cursor, SAMPLING, Scorer(Tokenizer(), Rewards(), *lengths))


def rollout_only(args: flat_settings) -> Controller:
    state, display = RunState(), RunDisplay("test", args.values.train_iters)
    made_by = generation(args, Engines(None), state)
    return Controller(
        settings=args,
        source=synchronous(made_by, display),
        learner=NullLearner(state, args.values.steps_per_rollout),
        trainer=None,
        generation=made_by,
        eval_prompts=[],
        display=display,
        metrics=Metrics(),
        engine_sync=EngineSync(),
        log_prob_bound=LogProbBound(None, state),
        state=state,
        record=Recorder(args, 0, Tokenizer()) if args.values.save_rollouts else None,
    )


@pytest.fixture()
def recorded(tmp_path) -> Path:
    """Three batches, as weights that change wrote them."""
    run = Recording(arguments(save_rollouts=tmp_path / "rollouts"))
    for _ in range(BATCHES):
        run.batch()
    return tmp_path / "rollouts"


def replayed(folder: Path) -> RecordedBatches:
    return RecordedBatches(folder, steps_per_rollout=2, consumed_prompts=0)


def test_a_replay_trains_on_the_same_samples(tmp_path):
    live, replay = Recording(arguments(save_rollouts=tmp_path)), replayed(tmp_path)
    for number in range(BATCHES):
        batch, again = live.batch(), replay.next_batch(2 * number)
        assert batch.metrics == again.metrics
        assert batch.consumed_prompts == again.consumed_prompts == replay.state().consumed_prompts
        samples = zip(*(training_samples(b.groups, "group-mean", "R3") for b in (batch, again)), strict=True)
        for one, other in samples:
            assert one.routed_experts is not None
            for name, value in vars(one).items():
                np.testing.assert_array_equal(value, getattr(other, name), strict=True, err_msg=name)
    of_programs = [batch_path(tmp_path, batch) for batch in range(BATCHES)]
    of_people = [path.with_suffix(".jsonl") for path in of_programs]
    assert sorted(tmp_path.iterdir()) == sorted([*of_programs, *of_people])
    for programs, people in zip(of_programs, of_people, strict=True):
        rewards = [c.reward for group in read_record(programs).groups for c in group]
        assert [json.loads(line)["reward"] for line in people.read_text().splitlines()] == rewards


class Teachers:
    """The score of a token is its place in the response."""

    def score(self, completions, on_progress=None):
        for done, completion in enumerate(completions, 1):
            completion.teacher_log_probs = -np.arange(completion.num_sampled, dtype=np.float32)
            on_progress(done, len(completions))


def test_teachers_score_a_batch_before_it_is_recorded(tmp_path):
    run = Recording(arguments(save_rollouts=tmp_path))
    run.source._generation = replace(run.source._generation, teachers=Teachers())
    batch, again = run.batch(), replayed(tmp_path).next_batch(0)
    assert "distillation/reverse_kl" in batch.metrics and batch.metrics == again.metrics
    for one, other in zip(sum(batch.groups, []), sum(again.groups, []), strict=True):
        np.testing.assert_array_equal(one.teacher_log_probs, np.arange(one.num_sampled) * -1.0)
        np.testing.assert_array_equal(one.teacher_log_probs, other.teacher_log_probs, strict=True)
    with pytest.raises(ValueError, match="no log-probs of a teacher"):
        Recording(arguments(save_rollouts=tmp_path)).batch()
        settings = arguments(train_from=tmp_path, train_iters=2)
        settings.distillation.teachers = ("one",)
        check_modes(settings)


def test_a_replay_that_has_trained_nothing_keeps_its_place(tmp_path):
    assert RecordedBatches(tmp_path, steps_per_rollout=2, consumed_prompts=8).state() == SourceState(8)


def test_advantages_are_made_anew(recorded):
    groups = replayed(recorded).next_batch(0).groups
    rewards = [[c.reward + c.overlong_penalty for c in group] for group in groups]
    expected = [own - other for a, b in rewards for own, other in ((a, b), (b, a))]
    assert [sample.advantage for sample in training_samples(groups, "leave-one-out", None)] == pytest.approx(
        expected
    )


def test_pairs_are_of_the_lengths_that_the_policy_sampled():
    group = [make_completion(make_prompt(), n, reward=r) for n, r in ((20, 1.0), (19, 0.0), (12, 1.0))]
    for gap, expected in ((0.0, [0.0, 0.0, 0.0]), (0.1, [0.5, -0.5, 0.0])):
        samples = training_samples([group], "equal-length-pairs", None, gap)
        assert [sample.advantage for sample in samples] == expected


def test_a_resumed_recording_goes_on(recorded):
    stale = batch_path(recorded, 1).read_bytes()
    Recording(arguments(save_rollouts=recorded, load="checkpoint"), iteration=2).batch()
    assert batch_path(recorded, 1).read_bytes() == stale  # the same batch, in its old place
    assert read_record(batch_path(recorded, 1)).consumed_prompts == 2 * SIZE


def test_a_recording_that_goes_back_sets_later_batches_aside(recorded):
    earlier, later = batch_path(recorded, 0).read_bytes(), batch_path(recorded, 2).read_bytes()
    run = Recording(arguments(save_rollouts=recorded, load="checkpoint", ckpt_step=2), iteration=2)
    for _ in range(2):
        run.batch()
    assert batch_path(recorded, 0).read_bytes() == earlier
    aside = recorded / "set-aside-001"
    moved = [batch_path(aside, batch) for batch in (1, 2)]
    assert sorted(aside.iterdir()) == sorted([*moved, *(path.with_suffix(".jsonl") for path in moved)])
    assert batch_path(aside, 2).read_bytes() == later
    assert batch_path(recorded, 1).is_file() and not (recorded / "set-aside-002").exists()


def test_rollout_only_runs_through_without_a_trainer(tmp_path):
    run = rollout_only(arguments(rollout_only=True, save_rollouts=tmp_path / "rollouts"))
    assert run.train().iteration == 2 * BATCHES
    assert len(set(run.generation.collector.seeds)) == BATCHES
    records = run.metrics.records
    assert [(step, metrics["policy/version"]) for step, metrics in records] == [(2, 0), (4, 0), (6, 0)]
    assert all("rollout/tokens_per_second" in metrics for _, metrics in records)
    assert not any(name.startswith("train/") for _, metrics in records for name in metrics)
    check_recorded(arguments(train_from=tmp_path / "rollouts"), 0)


@pytest.mark.parametrize("evaluation", [None, {"eval/accuracy": 0.25}])
def test_the_display_is_told_the_last_evaluation_before_the_first_batch(evaluation):
    run, told = rollout_only(arguments(rollout_only=True)), []
    run.state.eval_before = run.state.eval_after = evaluation
    run.display.recall = told.append
    run.train()
    assert told == [evaluation] * (evaluation is not None)


@pytest.mark.parametrize(
    ("mode", "other"),
    [
        *(("train_from", name) for name in ("rollout_only", "save_rollouts", "eval_data")),
        *(("rollout_only", name) for name in ("load", "save")),
    ],
)
def test_contradictions(mode, other):
    with pytest.raises(ValueError) as error:
        check_modes(arguments(**{mode: Path("x"), other: Path("y")}))
    check_refusal(str(error.value), f"--{mode.replace('_', '-')}", f"--{other.replace('_', '-')}", "leave")


def test_what_may_be_recorded_where(recorded):
    check_modes(arguments())
    check_modes(arguments(rollout_only=True))
    check_modes(arguments(record_responses=True))
    with pytest.raises(ValueError, match="--rollout-only takes none: leave one out"):
        check_modes(arguments(rollout_only=True, record_responses=True))
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
