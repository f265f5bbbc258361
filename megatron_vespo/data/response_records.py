"""Responses for people to read: one JSON object per response, with its turns as text.

    {"turns": [{"writer": "policy", "text": "<tool_call> ... </tool_call>",
                "tool_calls": [{"name": "multiply", "arguments": {"a": 17, "b": 3}}]},
               {"writer": "tool", "text": "51"},
               {"writer": "policy", "text": "It is 51."}],
     "reward": 1.0, "parts": {"form": 0.5}, "turn_rewards": [], "overlong_penalty": 0.0,
     "status": "ok", "error": "", "finish_reason": "stop", "sampled_tokens": 42, "given_tokens": 5,
     "policy_versions": [3, 4], "mean_log_prob": -0.41, "mean_support": 2.7}

`status` and `error` are those of the reward. `policy_versions` are those of the oldest and the newest token.
`mean_support` is how many tokens truncated sampling has left on average; absent if it is off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.data.tool_calls import read_call, tool_calls
from megatron_vespo.data.transcript import Turn, transcripts
from megatron_vespo.system.disk import replacing
from megatron_vespo.types import Completion

RESPONSES_SUFFIX = ".jsonl"  # beside the .npz of a batch


def response_records(tokenizer: Any, completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Return the records of scored completions."""
    return [_record(*pair) for pair in zip(completions, transcripts(tokenizer, completions), strict=True)]


def write_responses(path: Path, tokenizer: Any, groups: Sequence[Sequence[Completion]]) -> None:
    """Write or replace `path` atomically: the records of `groups`, one per line, with prompt and group."""
    with replacing(path) as stream:
        for number, group in enumerate(groups):
            prompt = group[0].prompt
            asked = {"prompt_id": prompt.prompt_id, "prompt": prompt.text, "answer": prompt.answer}
            for record in response_records(tokenizer, group):
                line = json.dumps({"group": number} | asked | record, ensure_ascii=False, allow_nan=False)
                # a lone surrogate has no bytes: it becomes JSON's own escape
                stream.write(line.encode("utf-8", "backslashreplace") + b"\n")


def _record(completion: Completion, turns: Sequence[Turn]) -> dict[str, Any]:
    versions, n = completion.policy_versions, completion.num_sampled
    return {
        "turns": [_turn(turn) for turn in turns],
        "reward": completion.reward,
        "parts": completion.reward_parts,
        "turn_rewards": list(completion.turn_rewards),
        "overlong_penalty": completion.overlong_penalty,
        "status": completion.reward_status,
        "error": completion.reward_error,
        "finish_reason": completion.finish_reason,
        "sampled_tokens": n,
        "given_tokens": len(completion.token_ids) - n,
        "policy_versions": [versions.oldest, versions.newest] if n else [],
        "mean_log_prob": sum(map(float, completion.log_probs)) / n if n else None,
    } | ({"mean_support": float(completion.supports.counts.mean())} if completion.supports and n else {})


def _turn(turn: Turn) -> dict[str, Any]:
    calls = tool_calls(turn.text) if turn.writer == "policy" else []
    return turn._asdict() | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


def _call(call: str) -> dict[str, Any]:
    try:
        name, arguments = read_call(call)
    except ValueError as error:
        return {"error": str(error), "text": call}
    return {"name": name, "arguments": arguments}
