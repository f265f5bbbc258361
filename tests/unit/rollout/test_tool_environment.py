"""Tools that the policy calls: how calls are read, what goes wrong, and what the policy is told."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial

import pytest

from megatron_vespo.arguments.environment import EnvironmentSettings
from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.driver.responses import with_tools
from megatron_vespo.rollout.tool_environment import ToolEnvironment, tool_calls
from tests.support.letter_tokenizer import letters
from tests.support.real_tokenizers import trl_template


def add(a: int, b: int = 1) -> int:
    """Add two integers.

    Args:
        a: the first
        b: the second
    """
    return a + b


async def wait(text: str) -> str:
    """Return the text after a moment.

    Args:
        text: any text
    """
    await asyncio.sleep(0.01)
    return text


def fail(kind: str) -> str:
    """Fail.

    Args:
        kind: how
    """
    raise {"key": KeyError("the door"), "exit": SystemExit(3), "stop": StopIteration()}[kind]


async def leave() -> str:
    """Leave."""
    sys.exit(4)


def anything(kind: str):
    """Return a value.

    Args:
        kind: which
    """
    values = {"long": "x" * 5000, "list": [1, "é"], "none": None, "set": {1}, "half": "\ud83d"}
    return values[kind]


class Tools(ToolEnvironment):
    functions = (add, wait, fail, leave, anything)


SETTINGS = EnvironmentSettings(
    environment=f"{__name__}:Tools",
    max_turns=4,
    max_turn_tokens=None,
    environment_timeout=5.0,
    generate_function=None,
)


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def results(text: str, made: ToolEnvironment | None = None) -> list[str]:
    step = asyncio.run((made or Tools()).step(text))
    assert step.done == (step.observation == "") and step.reward is None
    assert all(message["role"] == "tool" for message in step.observation)
    return [message["content"] for message in step.observation]


def test_a_turn_without_a_call_ends_the_episode():
    assert results("The answer is 7.") == results("") == []


def test_results_come_in_the_order_of_the_calls():
    made = Tools()
    text = f"Let me see.\n{call('wait', text='late')}\nand {call('add', a=3, b=4)}{call('add', a=1)} done"
    assert results(text, made) == ["late", "7", "2"]
    assert made.reward_data() == {"tool_calls": 3, "failed_tool_calls": 0}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<tool_call>{'name': 'add'}</tool_call>", "the tool call is not JSON"),
        ("<tool_call></tool_call>", "the tool call is not JSON"),
        ("<tool_call>" + "[" * 100_000, "Error: RecursionError"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}', "the tool call is not JSON"),
        ('<tool_call>["add"]</tool_call>', 'a tool call is an object: {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"arguments": {}}</tool_call>', "a tool call is an object"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "arguments of a tool call must be an"),
        ("<tool_call>\n<function=add>\n</function></tool_call>", "the tool call is not JSON"),
        (call("multiply", a=1), "there is no tool 'multiply'; there are add, wait, fail, leave, anything"),
        (call("__init__"), "there is no tool '__init__'"),
        (call("add"), "missing a required argument: 'a'"),
        (call("add", a=1, c=2), "got an unexpected keyword argument 'c'"),
        (call("add", a="1", b=2), "Error: TypeError: can only concatenate str"),
        (call("fail", kind="key"), "Error: KeyError: 'the door'"),
        (call("fail", kind="stop"), "Error: RuntimeError: coroutine raised StopIteration"),
        (call("fail", kind="exit"), "Error: SystemExit: 3"),
        (call("leave"), "Error: SystemExit: 4"),
    ],
)
def test_the_policy_is_told_what_went_wrong(text, told):
    made = Tools()
    [result] = results(text, made)
    assert result.startswith("Error: ") and told in result and len(result) < 5000
    assert made.reward_data() == {"tool_calls": 1, "failed_tool_calls": 1}


def test_a_call_that_fails_spoils_no_other():
    made = Tools()
    assert results(call("add", a=1) + call("add") + call("add", a=2), made)[::2] == ["2", "3"]
    assert made.num_failed_calls == 1


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("list", '[1, "é"]'),
        ("none", "null"),
        ("set", '"{1}"'),
        ("half", "?"),  # half of a surrogate pair, which no tokenizer takes
        ("long", "x" * 4096 + " ..."),
    ],
)
def test_results_are_text(kind, result):
    assert results(call("anything", kind=kind)) == [result]


def test_half_of_a_surrogate_pair_in_a_call_is_no_text_either():
    assert results('<tool_call>{"name": "wait", "arguments": {"text": "\\ud83d!"}}</tool_call>') == ["?!"]
    [result] = results('<tool_call>{"name": "\\ud83d"}</tool_call>')
    result.encode()


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<think>maybe <tool_call>1</tool_call></think><tool_call>2</tool_call>", ["2"]),
        ("maybe <tool_call>1</tool_call></think><tool_call>2</tool_call>", ["2"]),  # the prompt opened it
        ("<think>a</think><tool_call>1</tool_call><think><tool_call>2</tool_call></think>", ["1"]),
        ("<think>a</think><tool_call>1</tool_call><think><tool_call>2</tool_call>", ["1"]),
        ("<think><tool_call>1</tool_call>", []),
        ('<think>a</think><tool_call>"</think>"</tool_call>', ['"</think>"']),
        ("<tool_call>1</tool_call><tool_call>2", ["1", "2"]),
        ("</tool_call>1<tool_call>2</tool_call>", ["2"]),
        ("<tool_call>\n 1 \n</tool_call>", ["1"]),
    ],
)
def test_where_calls_are_found(text, calls):
    assert tool_calls(text) == calls


def environment_of(*tools) -> type[ToolEnvironment]:
    return type("Own", (ToolEnvironment,), {"functions": tools})


def undescribed(a: int) -> int:
    return a


def without_hints(a):
    """Return a.

    Args:
        a: a number
    """
    return a


def without_arguments_section(a: int) -> int:
    """Return a."""
    return a


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ((), "Own.functions is empty"),
        ((add, undescribed), "Own: the tool undescribed: "),
        ((without_hints,), "Own: the tool without_hints: "),
        ((without_arguments_section,), "Own: the tool without_arguments_section: "),
        ((add, add), "Own.functions has 'add': two functions have one name"),
        ((partial(add, b=2),), "a tool needs a name, so use def"),
    ],
)
def test_functions_that_cannot_be_described_are_refused_in_one_line(tools, message):
    with pytest.raises(ValueError) as refused:
        environment_of(*tools).tools()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_functions_are_described_to_the_model():
    description = environment_of(add).tools()[0]["function"]
    assert description["name"] == "add" and description["description"] == "Add two integers."
    assert description["parameters"]["required"] == ["a"]
    form = with_tools(ChatFormat(letters(trl_template("qwen3"))), SETTINGS)
    text = form.text([{"role": "user", "content": "What is 3 + 4?"}])
    assert '"name": "add"' in text and "Return the text after a moment." in text


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("qwen2_5", True),
        ("qwen3", True),
        ("qwen3_instruct_2507", True),
        ("qwen3_6", False),  # calls in XML, between the same tags
        ("glm4moe", False),
        ("llama3_1", False),
        ("phi3", False),
    ],
)
def test_a_template_of_another_tool_format_is_refused(name, accepted):
    form = ChatFormat(letters(trl_template(name)))
    if accepted:
        assert with_tools(form, SETTINGS).arguments["tools"] == Tools.tools()
        return
    with pytest.raises(
        ValueError, match="Tools reads tool calls as <tool_call>.*write an environment for it"
    ):
        with_tools(form, SETTINGS)
