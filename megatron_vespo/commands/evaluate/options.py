"""The flags of `megatron-vespo evaluate`, parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.rollout.scoring import TurnRewards
from megatron_vespo.system.settings import Settings


@dataclass(frozen=True)
class EvaluateOptions(Settings):
    checkpoint: Path
    hf_config: Path | None
    engine_url: tuple[str, ...] | None  # None: engines are started
    api_key_env: str | None
    data: Mapping[str, Path]  # file of each prompt set, by its name
    output_dir: Path
    # prompts
    prompt_key: str
    answer_key: str
    answer_pattern: str | None
    apply_chat_template: bool
    chat_template_arguments: Mapping[str, Any]
    max_prompt_tokens: int
    num_prompts: int | None  # of each set; None: all
    # multi-turn responses
    environment: str | None
    max_turns: int
    max_turn_tokens: int | None
    environment_timeout: float  # seconds
    generate_function: str | None
    # completions and rewards
    max_completion_tokens: int
    generate_timeout: float  # seconds
    max_request_retries: int
    reward_function: str
    turn_rewards: TurnRewards
    reward_workers: int
    reward_timeout: float  # seconds
    reward_memory_gb: float
    code_reward: str  # "all" or "share"
    code_timeout: float  # seconds, like the next one
    code_test_timeout: float
    code_memory_mb: int
    code_sandbox_url: str | None
    num_completions: int  # per prompt
    temperature: float  # 0: greedy
    top_p: float
    top_k: int  # -1: all tokens
    pass_reward: float
    seed: int
    save_responses: bool
    # engines
    rollout_engines: int
    rollout_port: int  # of the first engine; 0: free ports
    engine_start_timeout: float  # seconds, like the next one
    engine_health_timeout: float
    engine_restarts: int
    min_engines: int
    ray_address: str | None
    sglang_flags: tuple[str, ...]  # as SGLang takes them
