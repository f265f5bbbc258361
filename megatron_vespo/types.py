"""The data that travels between rollout, rewards and trainer. Layer 0: numpy and stdlib only.

One sample's life:

    Prompt --engine--> Completion --reward--> Completion.reward --advantages--> TrainingSample

Shapes: P prompt tokens, C completion tokens, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One row of the prompt file, tokenised once.

    Example:
        Prompt(prompt_id=17, token_ids=[5, 9, 2], answer="42", text="6 * 7 = ?", metadata={})
    """

    prompt_id: int  # row number in the file, from 0: stable across epochs and resumes
    token_ids: list[int]  # [P], chat template applied
    answer: str  # reference answer, as the reward function wants it
    text: str  # the user's message before the chat template, for people to read
    metadata: dict = field(default_factory=dict)  # the row's other columns, for custom rewards


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Log-probs, the engine's and the trainer's, are those after `temperature`.

    `top_p` and `top_k` are for evaluation alone: log-probs do not know of them.
    """

    temperature: float  # 0: the likeliest token
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = -1  # all


@dataclass
class Completion:
    """One sampled response, as the engine made it; `reward` is filled in later.

    Example, two tokens made by policy version 3 of a 4-layer model with top-2 experts:
        Completion(prompt=..., token_ids=[11, 1], log_probs=float32[2], policy_versions=int64[2] of 3,
                   routed_experts=uint8[P + 1, 4, 2], finish_reason="stop", temperature=1.0)
    """

    prompt: Prompt
    token_ids: list[int]  # [C], the stop token included when there is one
    log_probs: np.ndarray  # [C] float32, the engine's, at `temperature`
    policy_versions: np.ndarray  # [C] int64, the version of the weights that made each token
    # [P + C - 1, L, K] uint8, the choices of the passes that sampled (the last token never enters); None if
    # nobody asked, or if the engine has lost them: see `num_retractions`
    routed_experts: np.ndarray | None
    finish_reason: str  # "stop", "length", or "abort": a beginning, to be continued
    temperature: float
    reward: float | None = None  # the task's
    reward_status: str = "ok"  # or "timeout", "error": then the reward is 0.0 for want of one
    overlong_penalty: float = 0.0  # of --overlong-buffer, at most 0
    rejections: tuple[str, ...] = ()  # draws in its place before, whose log-probs were not finite
    # How often the engine dropped its keys and values, for want of memory or for new weights. It computes
    # them anew from the tokens, in another kind of pass, and its routes are those of that pass.
    num_retractions: int = 0

    @property
    def shaped_reward(self) -> float:
        """What advantages are made of."""
        assert self.reward is not None
        return self.reward + self.overlong_penalty


@dataclass
class TrainingSample:
    """One sequence to train on. Trained tokens are the completion's, positions [P, P + C).

    Example:
        TrainingSample(token_ids=int64[P + C], prompt_length=P, behavior_log_probs=float32[C],
                       policy_versions=int64[C], advantage=-0.25, reward=0.0, temperature=1.0, group_id=7)
    """

    token_ids: np.ndarray  # [P + C] int64
    prompt_length: int
    behavior_log_probs: np.ndarray  # [C] float32, mu: what the engine said when it sampled
    policy_versions: np.ndarray  # [C] int64
    advantage: float
    reward: float
    temperature: float
    group_id: int  # samples of one prompt in one rollout batch share it
    old_log_probs: np.ndarray | None = None  # [C] float32, pi_old: the trainer's, before the first update
    routed_experts: np.ndarray | None = None  # [P + C - 1, L, K] uint8, what the engine chose
    routes_version: int | None = None  # the policy version that chose them
    replays: bool = True  # False: no routes are known, and the routers choose in spite of R3

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def completion_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass
class RunState:
    """What a checkpoint must bring back beside weights and optimizer; `iteration` is the policy version."""

    iteration: int = 0  # optimizer steps done
    consumed_prompts: int = 0
    train_seconds: float = 0.0
    evaluation_due: bool = False  # a preemption has interrupted it
    eval_before: dict[str, float] | None = None  # metrics of the first evaluation
    eval_after: dict[str, float] | None = None  # of the last one
    max_logprob_difference: float = 0.0
    log_w_floor: dict[str, float] | None = None  # the last one measured, as metrics

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> RunState:
        """From what a checkpoint has stored, also under the names of version 0.1."""
        state = cls(**{name.replace("heldout_", "eval_"): value for name, value in stored.items()})
        for name in ("eval_before", "eval_after"):
            if (metrics := getattr(state, name)) is not None:
                setattr(state, name, {key.replace("heldout/", "eval/"): v for key, v in metrics.items()})
        return state
