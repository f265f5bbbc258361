"""Converts completions to plain arrays and back, bit-exact.

Fields of variable length are concatenated. N completions; per completion C tokens, and P tokens of its
prompt; L layers, E experts per token:

    completion_lengths int64 [N], completion_tokens int64, log_probs float32, policy_versions int64 [sum C]
    rewards (NaN: not scored yet), overlong_penalties, temperatures float64 [N]
    finish_reasons, reward_statuses str [N]
    num_retractions int64 [N], routed bool [N]
    routes uint8 [sum (P + C - 1) of the routed completions, L, E], absent if no completion is routed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_vespo.types import Completion, Prompt


def completion_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    rewards = [np.nan if c.reward is None else c.reward for c in completions]
    arrays = {
        "completion_lengths": np.array([len(c.token_ids) for c in completions], np.int64),
        "completion_tokens": end_to_end([c.token_ids for c in completions], np.int64),
        "log_probs": end_to_end([c.log_probs for c in completions], np.float32),
        "policy_versions": end_to_end([c.policy_versions for c in completions], np.int64),
        "rewards": np.array(rewards, np.float64),
        "overlong_penalties": np.array([c.overlong_penalty for c in completions], np.float64),
        "temperatures": np.array([c.temperature for c in completions], np.float64),
        "finish_reasons": np.array([c.finish_reason for c in completions], str),
        "reward_statuses": np.array([c.reward_status for c in completions], str),
        "num_retractions": np.array([c.num_retractions for c in completions], np.int64),
        "routed": np.array([c.routed_experts is not None for c in completions], bool),
    }
    if arrays["routed"].any():
        routes = [c.routed_experts for c in completions if c.routed_experts is not None]
        arrays["routes"] = np.concatenate(routes)
    return arrays


def completions_of(arrays: Mapping[str, np.ndarray], prompts: Sequence[Prompt]) -> list[Completion]:
    """Restore the completions; `prompts` has one prompt per completion."""
    lengths = arrays["completion_lengths"]
    rows = zip(
        prompts, split(arrays["completion_tokens"], lengths), split(arrays["log_probs"], lengths),
        split(arrays["policy_versions"], lengths), _routes(arrays, prompts), arrays["finish_reasons"],
        arrays["temperatures"], arrays["rewards"], arrays["reward_statuses"], arrays["overlong_penalties"],
        arrays["num_retractions"], strict=True,
    )  # fmt: skip
    return [
        Completion(
            prompt, tokens.tolist(), log_probs, versions, experts, str(finish), float(temperature),
            None if np.isnan(reward) else float(reward), str(status), float(penalty),
            num_retractions=int(retractions),
        )
        for prompt, tokens, log_probs, versions, experts, finish, temperature, reward, status, penalty,
        retractions in rows
    ]  # fmt: skip


def _routes(arrays: Mapping[str, np.ndarray], prompts: Sequence[Prompt]) -> list[np.ndarray | None]:
    if "routes" not in arrays:
        return [None] * len(prompts)
    entering = np.array([len(prompt.token_ids) for prompt in prompts]) + arrays["completion_lengths"] - 1
    parts = iter(split(arrays["routes"], entering[arrays["routed"]]))
    return [next(parts) if routed else None for routed in arrays["routed"]]


def end_to_end(parts: Sequence[Sequence | np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split `values` into its concatenated pieces, of these lengths."""
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
