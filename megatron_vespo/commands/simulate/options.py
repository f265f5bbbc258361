"""The flags of `megatron-vespo simulate`, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vespo.system.settings import Settings


@dataclass(frozen=True)
class SimulateOptions(Settings):
    """A rate of None is taken from `from_run` or from the preset."""

    # the run
    gpus: tuple[int, ...]  # each value is simulated, like those of the next two
    trainer_share: tuple[float, ...]  # of the GPUs
    max_staleness: tuple[int, ...] | None  # None: 0, N, 2N - 1, 2N, 4N of `steps_per_rollout` N
    sync_interval: int | None  # optimizer steps; None: `steps_per_rollout`
    rollout_batches: int
    rollout_batch_size: int  # prompts
    group_size: int  # responses per prompt
    steps_per_rollout: int
    on_weight_update: Literal["retract", "in-place", "abort"]
    stale_groups: Literal["requeue", "drop"]
    over_subscription: float | None  # rollout batches in flight or waiting; None: as many as the bound allows
    max_attempts: int
    save_interval: int | None  # optimizer steps; None: no checkpoints
    eval_prompts: int
    eval_interval: int  # rollout batches
    # lengths in tokens
    lengths_from: Path | None
    length_mean: float
    length_sigma: float  # of the length's logarithm
    length_prompt_share: float  # the prompt's share of its variance
    max_completion_tokens: int
    prompt_tokens: int
    # rates
    preset: str
    from_run: Path | None
    gpus_per_engine: int | None
    train_rate: float | None  # tokens/s per GPU
    log_prob_rate: float | None
    decode_ms: tuple[float, float] | None  # one token of each of r running requests takes A + B r ms
    prefill_rate: float | None  # tokens/s per engine
    max_running: int | None  # requests per engine
    sync_seconds: float | None
    save_seconds: float | None
    reward_seconds: float | None  # per response
    shared_cores: tuple[float, float, float] | None  # cores: in all, of the trainer alone, of an engine
    # failures
    failures_per_hour: float  # of one engine
    recovery_seconds: float
    lost_requests: float  # share of them
    picture: Path | None
    seed: int
