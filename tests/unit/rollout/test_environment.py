"""What --environment names, and what its steps answer."""

from __future__ import annotations

import abc

import numpy as np
import pytest

from megatron_vespo.rollout.environment import (
    Step,
    checked_step,
    load_environment,
    messages_of_step,
    tools_of,
    writer_of,
)


class Good:
    async def reset(self, prompt): ...

    async def step(self, text): ...

    async def close(self): ...


class NoReset:
    async def step(self, text): ...


class PlainStep(Good):
    def step(self, text): ...


class StepWithTwo(Good):
    async def step(self, text, prompt): ...


class ResetWithNone(Good):
    async def reset(self): ...


class PlainClose(Good):
    def close(self): ...


class NeedsSize(Good):
    def __init__(self, size): ...


class Abstract(Good, abc.ABC):
    @abc.abstractmethod
    def rules(self): ...


class PerhapsReplayable(Good):
    replayable = "no"


class NoRoles(Good):
    roles = None


class OneRole(Good):
    roles = "user"


class OtherRole(Good):
    roles = ("user", "assistant")


number = 7
HERE = __name__


def function(): ...


def test_an_environment_is_a_class():
    assert load_environment(f"{HERE}:Good") is Good


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Good", 'write "package.module:class"'),
        ("no_such_module:Good", "cannot import no_such_module"),
        (f"{HERE}:Missing", f"{HERE} has no 'Missing'"),
        (f"{HERE}:number", "is a int, not a class"),
        (f"{HERE}:function", "must be a class, it is a function"),
        (f"{HERE}:NoReset", "needs a method `async def reset(self, prompt)`"),
        (f"{HERE}:PlainStep", "needs a method `async def step(self, text)`"),
        (f"{HERE}:StepWithTwo", "needs a method `async def step(self, text)`"),
        (f"{HERE}:ResetWithNone", "needs a method `async def reset(self, prompt)`"),
        (f"{HERE}:PlainClose", "needs a method `async def close(self)`"),
        (f"{HERE}:Abstract", "is abstract, it leaves out rules"),
        (f"{HERE}:PerhapsReplayable", "replayable = 'no', must be True or False"),
        (f"{HERE}:NoRoles", "roles = None, must be a tuple of user, tool, system"),
        (f"{HERE}:OneRole", "roles = 'user', must be a tuple"),
        (f"{HERE}:OtherRole", "roles = ('user', 'assistant'), must be a tuple"),
        (f"{HERE}:NeedsSize", "is made without arguments, but missing a required argument: 'size'"),
    ],
)
def test_what_is_no_environment_is_refused_in_one_line(path, message):
    with pytest.raises(ValueError) as refused:
        load_environment(path)
    text = str(refused.value)
    assert message in text and path in text and "\n" not in text


class ToolsOfObjects(Good):
    def tools(self): ...


class ToolsRaise(Good):
    @classmethod
    def tools(cls):
        return {}["no key"]


class ToolsAreNumber(Good):
    @classmethod
    def tools(cls):
        return 3


class ToolsStatic(Good):
    @staticmethod
    def tools():
        return []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ToolsOfObjects, "ToolsOfObjects.tools() must be a class method"),
        (ToolsRaise, "ToolsRaise.tools() raised KeyError: 'no key'"),
        (ToolsAreNumber, "ToolsAreNumber.tools() returned 3, must be a list"),
    ],
)
def test_wrong_tools_are_refused_in_one_line(environment, message):
    with pytest.raises(ValueError) as refused:
        tools_of(environment)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_tools_are_optional():
    assert (tools_of(Good), tools_of(ToolsStatic)) == (None, [])


MESSAGE = {"role": "tool", "content": "7"}


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        (("more", 1, False), Step("more", 1, False)),
        (("more", None, False), Step("more", None, False)),
        (("", np.float32(0.5), True), Step("", np.float32(0.5), True)),
        (([MESSAGE], 0.0, False), Step([MESSAGE], 0.0, False)),
        ((None, 0.0, True), Step(None, 0.0, True)),  # nobody reads the last observation
        (Step([MESSAGE]), Step([MESSAGE], None, False)),
    ],
)
def test_answers_of_steps(answer, step):
    assert checked_step(answer) == step


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "must return (observation, reward, done), not None"),
        (("text", 1.0), "must return (observation, reward, done)"),
        (["text", 1.0, True], "must return (observation, reward, done)"),
        (("x" * 1000, 1.0), "..."),
        (("text", 1.0, 1), "done = 1, which must be True or False"),
        (("text", "1.0", False), "the reward '1.0', which must be a finite number"),
        (("text", float("inf"), False), "the reward inf"),
        (("text", 10**400, False), "which must be a finite number"),
        ((None, 1.0, False), "the observation None, neither text nor messages"),
        (([], 1.0, False), "the observation [], neither text nor messages"),
        (({"role": "user", "content": "7"}, 1.0, False), "neither text nor messages"),
        (([{"role": "user"}], 1.0, False), "'content' text"),
        (([{"role": "assistant", "content": "I am you"}], 1.0, False), "'role' must be one of user, tool"),
        (([{"role": "user", "content": ["7"]}], 1.0, False), "'content' text"),
    ],
)
def test_wrong_answers_of_steps_are_refused(answer, message):
    with pytest.raises(ValueError) as refused:
        checked_step(answer)
    assert message in str(refused.value) and len(str(refused.value)) < 250


def test_writers_and_messages():
    assert messages_of_step(Step("more")) == [{"role": "user", "content": "more"}]
    assert messages_of_step(Step((MESSAGE,))) == [MESSAGE]
    assert writer_of([MESSAGE, {"role": "user", "content": "?"}]) == "tool"
    assert writer_of([{"role": "user", "content": "?"}]) == "environment"
