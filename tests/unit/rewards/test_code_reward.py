"""The reward `code`: the program of a response, and its reward."""

import json

import pytest

from megatron_vespo.rewards.code import CodeReward, extract_program
from megatron_vespo.rewards.loading import load_reward_function
from megatron_vespo.rewards.pool import RewardItem, RewardPool

SUM = {"type": "stdin", "cases": [["1 2\n", "3\n"], ["-5 5\n", "0\n"], ["7 8", "15"]]}
ADD = {"type": "calls", "function": "add", "cases": [[[1, 2], 3], [[-5, 5], 0], [["a", "b"], "ab"]]}
ASSERTS = {
    "type": "asserts",
    "setup": "def check(f):\n    assert f(1, 2) == 3\n    assert f([1], [2]) == [1, 2]\n",
    "tests": ["check(candidate)"],
    "functions": {"candidate": "add"},
}
SCRIPT = "a, b = map(int, input().split())\nprint(a + b)\n"


def fenced(program: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{program}\n```\nDone."


def reward(program: str, tests: dict, **settings) -> float:
    return CodeReward(timeout_s=5.0, test_timeout_s=2.0, **settings)(fenced(program), json.dumps(tests), {})


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nbetter:\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nIt prints\n```\n3\n```", "a\n"),
        ("```\na\n```\nand\n```\nb\n```", "b\n"),
        ("```Python3\na\n```", "a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("1. do\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("<think>```python\na\n```</think>no code", None),
        ("<think>```python\na\n```</think>```python\nb\n```", "b\n"),
        ("a = 1", None),
        ("```python\na", None),
        ("", None),
    ],
)
def test_the_program_of_a_response(response, program):
    assert extract_program(response) == program


def test_scripts():
    assert reward(SCRIPT, SUM) == 1.0
    assert reward("print(3)", SUM) == 0.0
    assert reward("print(3)", SUM, share=True) == pytest.approx(1 / 3)
    assert reward(SCRIPT + "raise ValueError", SUM) == 0.0


@pytest.mark.parametrize("tests", [ADD, ASSERTS])
def test_functions(tests):
    assert reward("def add(a, b):\n    return a + b", tests) == 1.0
    assert reward("def add(a, b):\n    return 3", tests) == 0.0
    assert reward("def plus(a, b):\n    return a + b", tests) == 0.0
    assert reward("class Solution:\n    def add(self, a, b):\n        return a + b", tests) == 1.0


def test_the_share_of_calls_that_pass():
    assert reward("def add(a, b):\n    return 3", ADD, share=True) == pytest.approx(1 / 3)
    assert reward("def add(a, b):\n    return int(a) + int(b)", ADD, share=True) == pytest.approx(2 / 3)


def test_in_reward_workers():
    pool = RewardPool(load_reward_function("code"), num_workers=2, timeout_s=10.0, memory_gb=4.0)
    try:
        items = [RewardItem(fenced(SCRIPT), json.dumps(SUM), {}, ended=True) for _ in range(6)]
        results = pool.score([*items, RewardItem(fenced(SCRIPT), "42", {}, ended=True)])
    finally:
        pool.close()
    assert [result.value for result in results] == [1.0] * 6 + [0.0]
    assert results[-1].status == "error" and "must be JSON of tests" in results[-1].detail
