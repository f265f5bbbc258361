"""--on-alarm through the controller's loop; what generates and trains is a stand-in."""

from argparse import Namespace

import numpy as np
import pytest

from megatron_vespo.algorithms.token_sums import TOKEN_SUMS
from megatron_vespo.controller import FLOOR_INTERVAL, Controller, StoppedByAlarm
from megatron_vespo.conversion.parameter_groups import GRADIENT_GROUPS
from megatron_vespo.observability.metrics import MetricsWriter, batch_records, read_metrics
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.types import Completion, Prompt, RunState, SamplingParams

PROMPTS = [Prompt(prompt_id=i, token_ids=[1, 2], answer="", text="") for i in range(2)]
COMPLETIONS, MINI_BATCHES = 2, 2


class Cursor:
    consumed = 0

    def take(self, number: int) -> list[Prompt]:
        self.consumed += number
        return PROMPTS[:number]


class Collector:
    """Every completion is cut off in the batches of `truncated`."""

    def __init__(self, state: RunState, truncated: set[int]):
        self._state, self._truncated, self._batch = state, truncated, 0

    def collect(self, prompts, sampling, *, num_completions, seed, for_training=True):
        self._batch += 1
        reason = "length" if self._batch in self._truncated else "stop"
        return [[self._completion(prompt, reason) for _ in range(num_completions)] for prompt in prompts]

    def _completion(self, prompt: Prompt, reason: str) -> Completion:
        versions = np.full(3, self._state.iteration, np.int64)
        return Completion(prompt, [5, 6, 7], np.zeros(3, np.float32), versions, None, reason, 1.0)


class Trainer:
    def __init__(self):
        self.saved: list[dict] = []
        self.floors_measured = 0
        self.saved_buffers: list[bytes | None] = []

    def prepare(self, mini_batches: list) -> None:
        self._sizes = [len(samples) for samples in mini_batches]

    def train_step(self, index: int) -> dict:
        zeros = np.zeros(self._sizes[index], np.float32)
        return {
            **dict.fromkeys(("log_w", "mismatch", "engine_gap", "engine_difference", "rejected"), zeros),
            **dict.fromkeys(("phi", "correction"), zeros + 1),
            **dict.fromkeys(("kernel_c2", "expected_w"), np.full(2, np.nan)),
            "clip_bounds": np.zeros(2),
            "zero_weight_share": 0.0,
            "token_sums": np.zeros(len(TOKEN_SUMS)),
            "gradient_norms": np.zeros(len(GRADIENT_GROUPS)),
            **dict.fromkeys(("loss", "grad_norm", "entropy", "learning_rate"), 0.5),
            **dict.fromkeys(("padding_share", "imbalance"), 0.0),
            "num_tokens": 6,
        }

    def log_probs(self, samples: list) -> list[np.ndarray]:
        return [np.zeros(sample.completion_length, np.float32) for sample in samples]

    def log_w_floor(self, samples: list) -> np.ndarray:
        self.floors_measured += 1
        return np.zeros(len(samples), np.float32)

    def save(self, state: dict, rollout_buffer: bytes | None) -> None:
        self.saved.append(state)
        self.saved_buffers.append(rollout_buffer)


class EngineSync:
    def sync(self, version: int) -> float:
        return 1.0  # seconds of the weight check

    def metrics(self) -> dict[str, float]:
        return {}


class Rewards:
    """Rewards alternate, so that groups are not equal."""

    def score(self, items: list) -> list[RewardResult]:
        return [RewardResult(float(i % 2), "ok", "") for i in range(len(items))]


class Tokenizer:
    def batch_decode(self, token_ids: list, skip_special_tokens: bool) -> list[str]:
        return [""] * len(token_ids)


def controller(tmp_path, on_alarm: str, batches: int, truncated: set[int], **changes) -> Controller:
    args = Namespace(
        train_iters=MINI_BATCHES * batches,
        mini_batches=MINI_BATCHES,
        rollout_batch_size=len(PROMPTS),
        num_completions=COMPLETIONS,
        max_completion_tokens=3,
        advantage_estimator="group-mean",
        dynamic_sampling=False,
        overlong_buffer=0,
        overlong_penalty=1.0,
        ratio_denominator="recomputed",
        old_policy="current",
        max_logprob_difference=None,
        routing_replay=None,
        heldout_interval=5,
        heldout_completions=1,
        heldout_temperature=None,
        heldout_pass_reward=1.0,
        save="folder",
        save_interval=1000,
        on_alarm=on_alarm,
        sync_interval=None,
        stop_generation=False,
        seed=0,
    )
    vars(args).update(changes)
    state = RunState()
    return Controller(
        args=args,
        trainer=Trainer(),
        collector=Collector(state, truncated),
        scorer=Scorer(
            Tokenizer(), Rewards(), args.max_completion_tokens, args.overlong_buffer, args.overlong_penalty
        ),
        engine_sync=EngineSync(),
        cursor=Cursor(),
        heldout=[],
        sampling=SamplingParams(1.0, 3, ()),
        display=RunDisplay("test", args.train_iters),
        metrics=MetricsWriter(tmp_path, None),
        state=state,
    )


def alarms_on(tmp_path) -> list[int]:
    """Steps whose records have the alarm."""
    records = batch_records(read_metrics(tmp_path / "metrics.jsonl"))
    return [record["step"] for record in records if record.get("alarm/truncated_responses") == 1.0]


def test_warn_says_it_once_though_it_comes_and_goes(tmp_path, capsys):
    run = controller(tmp_path, "warn", 6, {2, 3, 5})
    assert run.train().iteration == 12
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm ")]
    assert [line.partition(":")[0] for line in said] == ["alarm truncated_responses at optimizer step 4"]
    assert alarms_on(tmp_path) == [4, 6, 10]
    assert [state["iteration"] for state in run.trainer.saved] == [12]


def test_stop_ends_the_run_with_its_metrics_written_and_nothing_saved(tmp_path):
    run = controller(tmp_path, "stop", 6, {2})
    with pytest.raises(
        StoppedByAlarm, match="^stopped by alarm truncated_responses at optimizer step 4: 100%"
    ):
        run.train()
    assert run.trainer.saved == []
    assert alarms_on(tmp_path) == [4]


def test_checkpoint_and_stop_saves_first(tmp_path):
    run = controller(tmp_path, "checkpoint-and-stop", 6, {2})
    with pytest.raises(StoppedByAlarm, match="; checkpoint in folder$") as stopped:
        run.train()
    assert isinstance(stopped.value, RuntimeError) and "\n" not in str(stopped.value)
    assert [state["iteration"] for state in run.trainer.saved] == [4]
    assert run.trainer.saved[0]["consumed_prompts"] == 4
    assert alarms_on(tmp_path) == [4]


@pytest.mark.parametrize("on_alarm", ["warn", "stop", "checkpoint-and-stop"])
def test_without_an_alarm_all_run_to_the_end(tmp_path, on_alarm):
    run = controller(tmp_path, on_alarm, 2, set())
    assert run.train().iteration == 4
    assert [state["iteration"] for state in run.trainer.saved] == [4]


def test_what_was_said_before_a_resume_is_not_said_again(tmp_path, capsys):
    controller(tmp_path / "first", "warn", 2, {2}).train()
    capsys.readouterr()
    run = controller(tmp_path / "second", "warn", 1, {1})
    run.history = batch_records(read_metrics(tmp_path / "first/metrics.jsonl"))
    run.train()
    assert "alarm " not in capsys.readouterr().out
    assert len(run.history) == 3


def test_the_floor_of_log_w_is_measured_at_the_start_and_every_so_many_batches(tmp_path):
    run = controller(tmp_path, "warn", FLOOR_INTERVAL + 2, set())
    run.train()
    assert run.trainer.floors_measured == 2
    records = batch_records(read_metrics(tmp_path / "metrics.jsonl"))
    assert all(record["ratio/floor_std"] == 0.0 for record in records)
    assert run.trainer.saved[-1]["log_w_floor"] == run.state.log_w_floor
    # a resumed run has the last one
    resumed = controller(tmp_path / "resumed", "warn", FLOOR_INTERVAL, set())
    resumed.state.iteration, resumed.state.log_w_floor = MINI_BATCHES, run.state.log_w_floor
    resumed.train()
    assert resumed.trainer.floors_measured == 0
