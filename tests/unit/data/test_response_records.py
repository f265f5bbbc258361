"""Responses as people read them."""

import json

import numpy as np
import pytest

from megatron_vespo.data.response_records import response_records, write_responses
from megatron_vespo.types import Completion, Prompt, Segments

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class Characters:
    def batch_decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(map(chr, ids)) for ids in tokens]


def response(*spans: tuple[str, str], prompt_id: int = 4, **fields) -> Completion:
    segments = Segments(tuple(writer for writer, _ in spans), tuple(len(text) for _, text in spans))
    n = segments.num_sampled
    versions = [2] * (n // 2) + [3] * (n - n // 2)
    log_probs = np.linspace(-1.0, 0.0, n, dtype=np.float32)
    tokens = [ord(letter) for _, text in spans for letter in text]
    return Completion(
        Prompt(prompt_id, [1, 2], "7", "six and one?", {}), tokens,
        log_probs, versions, None, fields.pop("finish_reason", "stop"), 1.0,
        segments=segments if len(spans) > 1 else None, **fields,
    )  # fmt: skip


def test_a_response_of_one_turn():
    (record,) = response_records(Characters(), [response(("policy", "seven"), reward=0.5)])
    assert record == {
        "turns": [{"writer": "policy", "text": "seven"}],
        "reward": 0.5,
        "parts": {},
        "turn_rewards": [],
        "overlong_penalty": 0.0,
        "status": "ok",
        "error": "",
        "finish_reason": "stop",
        "sampled_tokens": 5,
        "given_tokens": 0,
        "policy_versions": [2, 3],
        "mean_log_prob": pytest.approx(-0.5),
    }


def test_a_conversation_with_its_calls_and_rewards():
    calls = f"<think>{CALL}</think>{CALL}<tool_call>add 1</tool_call>"
    conversation = response(
        ("policy", calls), ("tool", CALL), ("policy", "7"),
        reward=0.0, reward_parts={"form": 0.5}, turn_rewards=(0.25, 1.0), overlong_penalty=-0.5,
        reward_status="timeout", reward_error="no reward within 1 s", finish_reason="turns",
    )  # fmt: skip
    (record,) = response_records(Characters(), [conversation])
    first, tool, last = record["turns"]
    broken = {
        "error": "the tool call is not JSON: Expecting value: line 1 column 1 (char 0)",
        "text": "add 1",
    }
    assert first["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}, broken]
    assert tool == {"writer": "tool", "text": CALL}  # a tool makes no calls
    assert last == {"writer": "policy", "text": "7"}
    assert (record["parts"], record["turn_rewards"]) == ({"form": 0.5}, [0.25, 1.0])
    assert (record["overlong_penalty"], record["finish_reason"]) == (-0.5, "turns")
    assert (record["status"], record["error"]) == ("timeout", "no reward within 1 s")
    assert (record["sampled_tokens"], record["given_tokens"]) == (conversation.num_sampled, len(CALL))


def test_a_response_without_tokens():
    (record,) = response_records(Characters(), [response(reward=0.0)])
    assert (record["sampled_tokens"], record["policy_versions"], record["mean_log_prob"]) == (0, [], None)
    assert record["turns"] == [{"writer": "policy", "text": ""}]


def test_one_line_per_response_with_its_prompt(tmp_path):
    path = tmp_path / "new" / "batch-000000.jsonl"
    texts = ["sieben é\n\u2028", "lone \ud800"]
    groups = [
        [response(("policy", text), reward=1.0) for text in texts],
        [response(("policy", "x"), reward=0.0, prompt_id=5)],
    ]
    write_responses(path, Characters(), groups)
    raw = path.read_bytes()
    assert raw.count(b"\n") == 3 and "é".encode() in raw
    records = [json.loads(line) for line in raw.split(b"\n")[:-1]]
    assert [record["turns"][0]["text"] for record in records] == [*texts, "x"]
    assert [(record["group"], record["prompt_id"], record["reward"]) for record in records] == [
        (0, 4, 1.0),
        (0, 4, 1.0),
        (1, 5, 0.0),
    ]
    assert {(record["prompt"], record["answer"]) for record in records} == {("six and one?", "7")}
    write_responses(path, Characters(), groups[:1])
    assert path.read_bytes().count(b"\n") == 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "batch-000000.jsonl"
    path.write_text("old\n")
    with pytest.raises(ValueError, match="Out of range float"):
        write_responses(path, Characters(), [[response(("policy", "x"), reward=float("nan"))]])
    assert path.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1
