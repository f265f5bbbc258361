"""Rows of public code sets -> question and tests, one entry per layout; code_tests.py has the tests' form."""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import io
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MAX_UNPACKED_BYTES = 2**30
# Methods of LeetCode use these names without an import.
_LEETCODE_IMPORTS = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""


@dataclass(frozen=True)
class CodeFormat:
    """Both functions take a row, and raise ValueError or KeyError for one that they cannot use."""

    question: Callable[[dict], str]
    tests: Callable[[dict], dict[str, Any]]


def _humaneval_question(row: dict) -> str:
    return f"Complete this Python function:\n\n```python\n{row['prompt'].strip()}\n```"


def _humaneval_tests(row: dict) -> dict[str, Any]:
    return {
        "type": "asserts",
        "prefix": row["prompt"],  # has the imports, and the functions that the solution may call
        "setup": row["test"],
        "tests": ["check(candidate)"],
        "functions": {"candidate": row["entry_point"]},
    }


def _mbpp_question(row: dict) -> str:
    return (
        f"{row['prompt'].strip()}\n\nYour code must pass this test:\n\n```python\n{row['test_list'][0]}\n```"
    )


def _mbpp_tests(row: dict) -> dict[str, Any]:
    imports = "\n".join(row.get("test_imports") or ())
    tests = [row["test"]] if row.get("test") else list(row["test_list"])
    names = sorted(_names_that_are_missing("\n".join([imports, *tests])) & _defined_names(row["code"]))
    if not names:
        raise ValueError("the tests call no function of the row's code")
    return {"type": "asserts", "setup": imports, "tests": tests, "functions": {name: name for name in names}}


def _names_that_are_missing(source: str) -> set[str]:
    """Names that the code reads and nowhere defines."""
    read, bound = set(), set(dir(builtins))
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return read - bound


def _defined_names(source: str) -> set[str]:
    body = _parsed(source).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"no Python: {error}") from error


def _livecodebench_question(row: dict) -> str:
    starter = row["starter_code"].strip()
    if starter:
        return f"{row['question_content'].strip()}\n\nBegin with this code:\n\n```python\n{starter}\n```"
    return f"{row['question_content'].strip()}\n\nRead from standard input and print to standard output."


def _livecodebench_tests(row: dict) -> dict[str, Any]:
    cases = [*json.loads(row["public_test_cases"]), *private_test_cases(row["private_test_cases"])]
    kinds = {case["testtype"] for case in cases}
    if kinds == {"stdin"}:
        return {"type": "stdin", "cases": [[case["input"], case["output"]] for case in cases]}
    if kinds != {"functional"}:
        raise ValueError(f"test cases of the kinds {', '.join(sorted(kinds)) or 'none'}")
    name = json.loads(row["metadata"])["func_name"]
    return _calls(name, [[_json_lines(case["input"]), json.loads(case["output"])] for case in cases])


def private_test_cases(text: str) -> list[dict[str, Any]]:
    """Private test cases of LiveCodeBench: JSON, or base64 of zlib of a pickle of JSON text.

    Raises:
        ValueError: it is neither, or the pickle holds anything but one string.
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        packed = zlib.decompressobj()
        content = packed.decompress(base64.b64decode(text, validate=True), _MAX_UNPACKED_BYTES)
        unpacked = _TextUnpickler(io.BytesIO(content)).load()
    except (
        binascii.Error,
        zlib.error,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
    ) as error:
        raise ValueError(f"private test cases are neither JSON nor a packed text: {error}") from error
    if not isinstance(unpacked, str):
        raise ValueError(f"private test cases hold a {type(unpacked).__name__}, not a text")
    return json.loads(unpacked)


class _TextUnpickler(pickle.Unpickler):
    """Reads plain values only: a pickle that names a class or function could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("the pickle names an object outside of it")


def _eurus_question(row: dict) -> str:
    return next(
        message["content"] for message in reversed(row["prompt"]) if message["role"] == "user"
    ).strip()


def _eurus_tests(row: dict) -> dict[str, Any]:
    found = json.loads(row["reward_model"]["ground_truth"])
    inputs, outputs = found["inputs"], found["outputs"]
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    if not found.get("fn_name"):
        return {
            "type": "stdin",
            "cases": [[_text(a), _text(b)] for a, b in zip(inputs, outputs, strict=True)],
        }
    if all(isinstance(arguments, str) for arguments in inputs):  # JSON, a line per argument
        inputs, outputs = list(map(_json_lines, inputs)), list(map(json.loads, outputs))
    elif all(isinstance(value, list) and len(value) == 1 for value in outputs):
        outputs = [value for (value,) in outputs]  # the layout of APPS
    return _calls(found["fn_name"], [list(case) for case in zip(inputs, outputs, strict=True)])


def _text(cell: Any) -> str:
    """Some rows have a list of lines instead of a text."""
    return "\n".join(map(str, cell)) if isinstance(cell, list) else str(cell)


def _calls(name: str, cases: list[list[Any]]) -> dict[str, Any]:
    return {"type": "calls", "prefix": _LEETCODE_IMPORTS, "function": name, "cases": cases}


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


CODE_FORMATS = {
    "humaneval": CodeFormat(_humaneval_question, _humaneval_tests),
    "mbpp": CodeFormat(_mbpp_question, _mbpp_tests),
    "livecodebench": CodeFormat(_livecodebench_question, _livecodebench_tests),
    "eurus": CodeFormat(_eurus_question, _eurus_tests),
}
