"""Runs a program in its sandbox: as a script, or as a module whose functions the tester calls."""

from __future__ import annotations

import builtins
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from megatron_vespo.rewards.jail import values


def run_script(source: str) -> int:
    """Run `source` like `python file.py`, with file descriptors 0 and 1; return the exit status."""
    _open_standard_streams()
    status = 0
    try:
        _execute([source], "__main__")
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # what the interpreter does at its end
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        status = 1
    try:
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    return status & 0xFF


def serve_functions(sources: list[str], channel: int) -> None:
    """Run `sources` in one namespace, then answer calls of its functions until the channel ends.

    A request is [name, arguments]. An answer is {"value": ...} or
    {"error": name of the exception, "text": ...}.
    The first message says whether the program itself could be run.
    """
    _open_standard_streams()
    try:
        namespace = _execute(sources, "solution")
    except BaseException as error:
        values.send(channel, _failure(error))
        return
    values.send(channel, {"value": None})
    while True:
        try:
            name, arguments = values.receive(channel)
        except values.Unreadable:
            return
        try:
            answer = {"value": values.encode(_function(namespace, name)(*map(values.decode, arguments)))}
            values.send(channel, answer)
        except BaseException as error:
            values.send(channel, _failure(error))


def _open_standard_streams() -> None:
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = ["program.py"]


def _execute(sources: list[str], name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    module.__dict__["__builtins__"] = builtins
    for source in sources:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _function(namespace: dict[str, Any], name: str) -> Callable:
    """The method of the program's class Solution (the form of LeetCode), or else its function."""
    if hasattr(namespace.get("Solution"), name):
        return getattr(namespace["Solution"](), name)
    if name in namespace:
        return namespace[name]
    raise NameError(f"the program defines no {name}")


def _failure(error: BaseException) -> dict[str, str]:
    try:
        text = str(error)[:1000]
    except BaseException:
        text = ""
    return {"error": type(error).__name__, "text": text}
