"""Rows of public code sets, in each set's own layout with problems of our own: question, tests, rewards."""

import base64
import json
import os
import pickle
import zlib

import pytest

from megatron_vespo.commands.main import run
from megatron_vespo.rewards.code import CodeReward
from megatron_vespo.rewards.code_formats import private_test_cases
from megatron_vespo.rewards.code_tests import parse_tests

HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": "from typing import List\n\n\ndef half(n: int) -> int:\n    return n // 2\n\n\n"
    'def halves(numbers: List[int]) -> List[int]:\n    """Halve every number, rounding down."""\n',
    "canonical_solution": "    return [half(n) for n in numbers]\n",
    "entry_point": "halves",
    "test": "import numpy as np\n\ndef assertion(out, exp, atol):\n    if atol == 0:\n"
    "        assert out == exp\n"
    "    else:\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n\n\ndef check(candidate):\n"
    "    inputs = [[[2, 3]], [[]], [[-1, 10**40]]]\n    results = [[1, 1], [], [-1, 5 * 10**39]]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n",
}
MBPP_CODE = "def widest(pairs):\n    return max(pairs, key=lambda pair: pair[1] - pair[0])\n"
MBPP = {
    "task_id": 9001,
    "code": MBPP_CODE,
    "prompt": "Write a function to find the widest of a list of intervals.",
    "source_file": "",
    "test_imports": ["import math"],
    "test_list": ["assert widest([(1, 2), (5, 9)]) == (5, 9)", "assert widest([(0, math.inf)])[0] == 0"],
    "test": "from math import inf\n\ndef assertion(out, exp, atol):\n    assert out == exp\n\n"
    "inputs = [[[(1, 2), (5, 9)]], [[(0, inf)]]]\nresults = [(5, 9), (0, inf)]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(widest(*inp), exp, 0)\n",
}


def packed(cases: list[dict]) -> str:
    """As LiveCodeBench packs private test cases."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def livecodebench(cases: list[tuple[str, str]], kind: str, starter: str, metadata: dict) -> dict:
    public, *private = [{"input": a, "output": b, "testtype": kind} for a, b in cases]
    return {
        "question_title": "Count",
        "question_content": "Say how many numbers there are.",
        "platform": "atcoder",
        "question_id": "abc999_a",
        "contest_id": "abc999",
        "contest_date": "2030-01-01T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps([public]),
        "private_test_cases": packed(private),
        "metadata": json.dumps(metadata),
    }


LCB_SCRIPT = livecodebench([("3\n1 2 3\n", "3\n"), ("0\n\n", "0")], "stdin", "", {})
LCB_METHOD = livecodebench(
    [("[1, 2, 3]\n2", "5"), ("[]\n7", "7")],
    "functional",
    "class Solution:\n    def product(self, numbers: List[int], more: int) -> int:\n        ",
    {"func_name": "product"},
)


def eurus(tests: dict, ability: str = "code") -> dict:
    return {
        "data_source": "taco",
        "prompt": [
            {"role": "system", "content": "Think step by step."},
            {"role": "user", "content": "Add two numbers.\n\nWrite Python code to solve the problem."},
        ],
        "ability": ability,
        "reward_model": {"ground_truth": json.dumps(tests), "style": "rule"},
        "extra_info": {"index": 7, "split": "train"},
    }


EURUS_SCRIPT = eurus({"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"]})
EURUS_LINES = eurus({"inputs": [["1 2", ""], "2 2"], "outputs": [["3"], "4"]})
EURUS_FUNCTION = eurus({"inputs": [[1, 2], ["a", "b"]], "outputs": [[3], ["ab"]], "fn_name": "add"})
EURUS_JSON = eurus({"inputs": ["1\n2", '"a"\n"b"'], "outputs": ["3", '"ab"'], "fn_name": "add"})

ADD_SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
ADD = "def add(a, b):\n    return a + b"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
ROWS = [  # set, row, a right program, a wrong one, part of the question
    (
        "humaneval-plus", HUMANEVAL, "def halves(numbers: List[int]):\n    return [half(n) for n in numbers]",
        "def halves(numbers):\n    return [n / 2 for n in numbers]", "def halves(numbers: List[int])",
    ),
    ("mbpp-plus", MBPP, MBPP_CODE, MBPP_CODE.replace("max", "min"), "assert widest([(1, 2), (5, 9)]) =="),
    ("mbpp-plus", MBPP | {"test": None}, MBPP_CODE, "def widest(pairs):\n    return (5, 9)", "of intervals."),
    ("livecodebench-v6", LCB_SCRIPT, "print(int(input()))", "print(3)", "Read from standard input"),
    (
        "livecodebench-v6", LCB_METHOD,
        "class Solution:\n    def product(self, a: List[int], b: int):\n        return len(a) + b",
        "class Solution:\n    def product(self, numbers, more):\n        return 5", "class Solution:",
    ),
    ("eurus-2-code", EURUS_SCRIPT, ADD_SCRIPT, "print(3)", "Add two numbers."),
    ("eurus-2-code", EURUS_LINES, ADD_SCRIPT, "print(3)", "Add two numbers."),
    ("eurus-2-code", EURUS_FUNCTION, ADD, "def add(a, b):\n    return 3", "Add two numbers."),
    ("eurus-2-code", EURUS_JSON, METHOD, "add = max", "Add two"),
]  # fmt: skip


def prepared(tmp_path, name: str, rows: list[dict], *flags: str) -> list[dict]:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["prepare-data", name, str(out), "--source", str(source), "--force", *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(("name", "row", "right", "wrong", "part"), ROWS)
def test_a_prepared_row_rewards_the_right_program(tmp_path, name, row, right, wrong, part):
    [problem] = prepared(tmp_path, name, [row])
    assert problem.keys() == {"question", "answer", "source"}
    assert part in problem["question"] and problem["source"].startswith(name + "/")
    reward = CodeReward()
    assert reward(f"```python\n{right}\n```", problem["answer"], {}) == 1.0
    assert reward(f"```python\n{wrong}\n```", problem["answer"], {}) == 0.0


def test_the_number_of_tests(tmp_path):
    def number(name: str, row: dict) -> int:
        return len(parse_tests(prepared(tmp_path, name, [row])[0]["answer"]))

    assert number("livecodebench-v6", LCB_SCRIPT) == 2  # public and private
    assert number("mbpp-plus", {**MBPP, "test": None}) == 2
    assert number("humaneval-plus", HUMANEVAL) == 1


def test_math_rows_of_eurus_are_not_of_the_code_set(tmp_path, capsys):
    assert len(prepared(tmp_path, "eurus-2-code", [eurus({}, "math"), EURUS_SCRIPT])) == 1
    assert "rows read                                             1" in capsys.readouterr().out


def test_a_problem_with_other_tests_is_kept_once(tmp_path):
    [problem] = prepared(tmp_path, "eurus-2-code", [EURUS_SCRIPT, EURUS_LINES])
    assert json.loads(problem["answer"])["cases"] == [["1 2\n", "3\n"], ["2 2\n", "4\n"]]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval-plus", {"prompt": "def f():\n    pass"}, "no column or field 'test', it has prompt"),
        (
            "mbpp-plus",
            {**MBPP, "code": "def other():\n    pass"},
            "the tests call no function of the row's code",
        ),
        ("mbpp-plus", {**MBPP, "test": "assert widest("}, "no Python: "),
        ("livecodebench-v6", {**LCB_SCRIPT, "private_test_cases": "?"}, "neither JSON nor a packed text"),
        ("livecodebench-v6", {**LCB_METHOD, "metadata": "{}"}, "no column or field 'func_name'"),
        ("eurus-2-code", eurus({"inputs": ["1"], "outputs": []}), "1 inputs and 0 outputs"),
        ("eurus-2-code", eurus({"inputs": ["x"], "outputs": ["3"], "fn_name": "f"}), "Expecting value"),
    ],
)
def test_rows_without_usable_tests(tmp_path, capsys, name, row, message):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    assert run(["prepare-data", name, str(tmp_path / "out.jsonl"), "--source", str(source)]) == 2
    error = capsys.readouterr().err
    assert message in error and f"{source} line 1" in error and error.count("\n") == 1


class Command:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PICKLED_FOLDER"],))


@pytest.mark.parametrize(
    "content",
    [
        lambda: pickle.dumps(Command()),
        lambda: pickle.dumps(["a list"]),
        lambda: pickle.dumps("[]")[:-3],
        lambda: b"cos\nsystem\n(S'true'\ntR.",
        lambda: b"\x80\x04N.",
        lambda: b"",
    ],
)
def test_private_test_cases_run_nothing(tmp_path, monkeypatch, content):
    monkeypatch.setenv("PICKLED_FOLDER", str(tmp_path / "made"))
    with pytest.raises(ValueError):
        private_test_cases(base64.b64encode(zlib.compress(content())).decode())
    assert not (tmp_path / "made").exists()


def test_private_test_cases_in_both_forms():
    cases = [{"input": "1", "output": "2", "testtype": "stdin"}]
    assert private_test_cases(json.dumps(cases)) == private_test_cases(packed(cases)) == cases
