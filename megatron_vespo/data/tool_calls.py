"""Reads the tool calls in a turn's text, in the format of Qwen3 (also known as Hermes).

<tool_call>
{"name": "multiply", "arguments": {"a": 17, "b": 3}}
</tool_call>
"""

from __future__ import annotations

import json
import re
from typing import Any

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
# Calls that a model only thinks of are not made. The prompt may have opened the thinking already.
_OPENED_BEFORE = re.compile(r"\A(?:(?!<think>).)*?</think>", re.DOTALL)
_THINKING_OR_CALL = re.compile(
    rf"<think>.*?(?:</think>|\Z)|{OPEN_TAG}(?P<call>.*?)(?:{CLOSE_TAG}|\Z)", re.DOTALL
)


def tool_calls(text: str) -> list[str]:
    """Return the contents of all tool calls in a turn's text, outside of its thinking."""
    found = (match["call"] for match in _THINKING_OR_CALL.finditer(_OPENED_BEFORE.sub("", text)))
    return [call.strip() for call in found if call is not None]


def read_call(call: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a tool call; ValueError says what is wrong with it."""
    try:
        parsed = json.loads(call)
    except ValueError as error:
        raise ValueError(f"the tool call is not JSON: {error}") from None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str):
        raise ValueError('a tool call is an object: {"name": ..., "arguments": {...}}')
    arguments = parsed.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a tool call must be an object")
    return parsed["name"], arguments
