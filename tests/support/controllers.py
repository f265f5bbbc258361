"""A controller whose engines, trainer and rewards are stood in for."""

from __future__ import annotations

import numpy as np

from megatron_vespo.algorithms.token_sums import TokenSums
from megatron_vespo.driver.controller import Controller
from megatron_vespo.driver.learner import LogProbBound, PolicyLearner
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.models.parameter_groups import GRADIENT_GROUPS
from megatron_vespo.observability.metrics import MetricsWriter
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.batch_source import BatchSource
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.rollout.synchronous_batches import SynchronousBatches
from megatron_vespo.system.preemption import Preemption
from megatron_vespo.types import Prompt, SamplingParams
from tests.support.builders import make_group, make_prompt
from tests.support.settings import flat_settings

LOG_MISMATCH = ("log_mismatch_in_w", "log_mismatch", "log_mismatch_abs_max")
PROMPTS = [make_prompt(i, [1, 2]) for i in range(2)]
COMPLETIONS, MINI_BATCHES = 2, 2
FLAGS = dict(
    steps_per_rollout=MINI_BATCHES,
    max_completion_tokens=3,
    advantage_estimator="group-mean",
    pair_length_gap=0.1,
    kl_coef=None,
    overlong_buffer=0,
    overlong_penalty=1.0,
    routing_replay=None,
    eval_interval=5,
    eval_completions=1,
    eval_temperature=None,
    eval_pass_reward=1.0,
    save="folder",
    save_interval=1000,
    on_alarm="warn",
    sync_interval=None,
    seed=0,
)


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
        made = {"versions": self._state.iteration, "finish_reason": reason}
        return [make_group(prompt, [3] * num_completions, **made) for prompt in prompts]


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
            **dict.fromkeys(("log_w", "rejected", *LOG_MISMATCH), zeros),
            **dict.fromkeys(("weight", "correction"), zeros + 1),
            **dict.fromkeys(("kernel_c2", "expected_w"), np.full(2, np.nan)),
            "clip_bounds": np.zeros(2),
            "zero_weight_share": 0.0,
            **dict.fromkeys(("ratio_sums", "log_mismatch_sums"), TokenSums(0.0, 0.0, 0.0)),
            "reference_sums": TokenSums(*[np.nan] * 3),
            "gradient_norms": np.zeros(len(GRADIENT_GROUPS)),
            **dict.fromkeys(("loss", "grad_norm", "entropy", "learning_rate"), 0.5),
            **dict.fromkeys(("padding_share", "imbalance"), 0.0),
            "num_tokens": 6,
        }

    def log_probs(self, samples: list) -> list[np.ndarray]:
        return [np.zeros(sample.num_trained, np.float32) for sample in samples]

    def log_w_floor(self, samples: list) -> np.ndarray:
        self.floors_measured += 1
        return np.zeros(len(samples), np.float32)

    def save(self, state: dict, rollout_buffer: bytes | None) -> None:
        self.saved.append(state)
        self.saved_buffers.append(rollout_buffer)


class EngineSync:
    def sync(self, version: int) -> dict[str, float]:
        return {"sync/weight_check_seconds": 1.0}

    def metrics(self) -> dict[str, float]:
        return {}


class Rewards:
    """Rewards alternate, so that groups are not equal."""

    def score(self, items: list) -> list[RewardResult]:
        return [RewardResult(float(i % 2), "ok", "") for i in range(len(items))]


class Tokenizer:
    def batch_decode(self, token_ids: list, skip_special_tokens: bool) -> list[str]:
        return [""] * len(token_ids)


def controller(
    tmp_path,
    on_alarm: str,
    batches: int,
    truncated: set[int],
    *,
    state: RunState | None = None,
    source: BatchSource | None = None,
    **changes,
) -> Controller:
    """`source` is a synchronous one unless it is given; `changes` are of the flags."""
    flags = FLAGS | {"train_iters": MINI_BATCHES * batches, "on_alarm": on_alarm}
    settings = flat_settings(**flags | changes)
    args = settings.values
    state, display = state or RunState(), RunDisplay("test", args.train_iters)
    scorer = Scorer(
        Tokenizer(), Rewards(), args.max_completion_tokens, args.overlong_buffer, args.overlong_penalty
    )
    sampling = SamplingParams(1.0, 3, ())
    generation = Generation(Collector(state, truncated), Cursor(), sampling, scorer)
    preemption = Preemption(deadline_s=60.0)
    if source is None:
        source = SynchronousBatches(
            generation, batch_size=len(PROMPTS), group_size=COMPLETIONS, max_batches=None, seed=0,
            advantage_estimator=args.advantage_estimator, display=display, preemption=preemption,
        )  # fmt: skip
    trainer, bound = Trainer(), LogProbBound(None, state)
    return Controller(
        settings=settings,
        source=source,
        learner=PolicyLearner(
            trainer, state, display, args.steps_per_rollout, "recomputed", "current",
            compares_engines=not source.in_background, log_prob_bound=bound,
        ),
        trainer=trainer,
        generation=generation,
        engine_sync=EngineSync(),
        log_prob_bound=bound,
        eval_prompts=[],
        display=display,
        metrics=MetricsWriter(tmp_path, None),
        state=state,
        preemption=preemption,
    )  # fmt: skip
