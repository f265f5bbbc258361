"""Tests a program's functions from a sandbox of its own: the program never shares a process with its tests.

The tests see functions that send their arguments to the program and return what it answers. Expected values
and comparisons are here, where the program cannot read or change them.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import os
import select
from collections.abc import Callable, Iterator
from typing import Any

from megatron_vespo.rewards.jail import values

RELATIVE_TOLERANCE = 1e-6  # of a float that a case expects


class ProgramError(Exception):
    """The program raised an exception that is not one of Python's own."""


class _Lost(BaseException):
    """The program ended or was late: no later test can pass."""


def run_tests(tests: dict, channel: int, call_timeout_s: float, stop_at_failure: bool) -> Iterator[bool]:
    """Yield for each test whether it passed.

    `tests` are {"type": "calls", "function": name, "cases": [[arguments, expected], ...]}, or {"type":
    "asserts", "setup": code, "tests": [code, ...], "functions": {name in the tests: name in the program}}.
    """
    program = _Program(channel, call_timeout_s)
    try:
        program.answer()  # to the start of the program
        run = _run_cases if tests["type"] == "calls" else _run_asserts
        for passed in run(tests, program):
            yield passed and not program.is_lost  # a test may have caught the exception
            if program.is_lost or stop_at_failure and not passed:
                return
    except (_Lost, ProgramError, Exception):
        yield False


class _Program:
    """The channel to the program."""

    def __init__(self, channel: int, call_timeout_s: float) -> None:
        self._channel, self._timeout_s = channel, call_timeout_s
        self.is_lost = False

    def function(self, name: str) -> Callable:
        def call(*arguments: Any) -> Any:
            try:
                values.send(self._channel, [name, [values.encode(argument) for argument in arguments]])
            except OSError as error:
                raise self._lost() from error
            return self.answer()

        return call

    def answer(self) -> Any:
        ready, _, _ = select.select([self._channel], [], [], self._timeout_s)
        if not ready:
            raise self._lost()
        try:
            message = values.receive(self._channel)
            if isinstance(message, dict) and message.keys() == {"value"}:
                return values.decode(message["value"])
        except (values.Unreadable, RecursionError) as error:
            raise self._lost() from error
        if not isinstance(message, dict) or not isinstance(message.get("error"), str):
            raise self._lost()
        raise _exception(message)

    def _lost(self) -> _Lost:
        self.is_lost = True
        return _Lost()


def _exception(message: dict) -> Exception:
    """The exception of a failed call; tests of wrong arguments expect Python's own."""
    kind = getattr(builtins, message["error"], None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind(str(message.get("text")))
    return ProgramError(message["error"])


def _run_cases(tests: dict, program: _Program) -> Iterator[bool]:
    function = program.function(tests["function"])
    for arguments, expected in tests["cases"]:
        try:
            yield same(function(*arguments), expected)
        except (Exception, _Lost):
            yield False


def _run_asserts(tests: dict, program: _Program) -> Iterator[bool]:
    namespace: dict[str, Any] = {"__name__": "tests"}
    _make_allclose_strict()
    exec(compile(tests["setup"], "setup.py", "exec", dont_inherit=True), namespace)
    namespace |= {ours: program.function(theirs) for ours, theirs in tests["functions"].items()}
    for number, code in enumerate(tests["tests"]):
        try:
            exec(compile(code, f"test_{number}.py", "exec", dont_inherit=True), namespace)
            yield True
        except (Exception, _Lost):
            yield False


def _make_allclose_strict() -> None:
    """Let numpy.allclose compare equal shapes only: by broadcasting, [] would be close to every number."""
    with contextlib.suppress(ImportError):
        import numpy

        broadcasts = numpy.allclose

        def allclose(a: Any, b: Any, *tolerances: Any, **options: Any) -> bool:
            return numpy.shape(a) == numpy.shape(b) and broadcasts(a, b, *tolerances, **options)

        numpy.allclose = allclose


def same(value: Any, expected: Any) -> bool:
    """Whether a result is the expected JSON value; tuples are lists, floats agree roughly."""
    if isinstance(expected, list):
        if not isinstance(value, list | tuple) or len(value) != len(expected):
            return False
        return all(map(same, value, expected))
    if isinstance(expected, dict):
        if not isinstance(value, dict) or len(value) != len(expected):
            return False
        by_text = {str(key): item for key, item in value.items()}  # JSON has no other keys
        return all(key in by_text and same(by_text[key], item) for key, item in expected.items())
    if isinstance(expected, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return math.isclose(value, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)
    return value == expected


def report(results: Iterator[bool], result_fd: int) -> None:
    """Write one byte for each test: b"1" if it passed, else b"0"; at the end b"."."""
    for passed in results:
        os.write(result_fd, b"1" if passed else b"0")
    os.write(result_fd, b".")
