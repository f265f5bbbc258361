"""The reward `code`: runs the program of a response against the tests of its row."""

from __future__ import annotations

import functools
import re
import textwrap
import time
from dataclasses import astuple, dataclass
from typing import Any

from megatron_vespo.rewards.code_tests import Tests, parse_tests
from megatron_vespo.rewards.same_output import same_output
from megatron_vespo.rewards.sandbox import Limits, Sandbox, SandboxError
from megatron_vespo.rewards.sandbox_server import SandboxServer

_THINK_END = "</think>"
_FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*([^\s`]*)[^`\n]*")
_PYTHON = ("python", "python3", "py")


@dataclass(frozen=True)
class CodeReward:
    """`function(response, answer, metadata)` with its settings; `answer` holds the tests, see code_tests.py.

    The reward is 1.0 if the program passes all tests, else 0.0; with `share`, the share that it passes.
    """

    timeout_s: float = 8.0  # for all tests of a response
    test_timeout_s: float = 4.0  # for each test, or each call of a function
    memory_mb: int = 1024  # MiB
    share: bool = False
    server_url: str | None = None  # None: namespaces of this machine

    def __call__(self, response: str, answer: str, metadata: dict) -> float:
        tests = parse_tests(answer)
        program = extract_program(response)
        if program is None:
            return 0.0
        deadline = time.monotonic() + self.timeout_s
        try:
            passed = self._passed(program, tests, deadline)
        except SandboxError:
            _sandbox.cache_clear()  # the next response gets a new one
            raise
        num_passed = sum(passed)
        return num_passed / len(tests) if self.share else float(num_passed == len(tests))

    def check(self) -> None:
        """ValueError in one line if this machine cannot make the sandbox, or the server does not answer."""
        _sandbox(self.server_url)

    def _passed(self, program: str, tests: Tests, deadline: float) -> list[bool]:
        sandbox = _sandbox(self.server_url)
        if tests.functions is not None:
            limits = Limits(self.timeout_s, self.memory_mb * 2**20)  # one process for all calls
            return sandbox.run_tests(
                [tests.prefix, program], tests.functions, limits, deadline,
                call_timeout_s=self.test_timeout_s, stop_at_failure=not self.share,
            )  # fmt: skip
        limits = Limits(self.test_timeout_s, self.memory_mb * 2**20)
        passed: list[bool] = []
        for stdin, expected in tests.cases:
            now = time.monotonic()
            if now >= deadline or not (self.share or all(passed)):
                break
            result = sandbox.run_script(program, stdin, limits, min(deadline, now + self.test_timeout_s))
            printed = result.stdout.decode(errors="replace")
            passed.append(result.exit_status == 0 and same_output(printed, expected))
        return passed

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_worker, astuple(self)


def _in_worker(*settings: Any) -> CodeReward:
    """Read the reward's pickle in a reward worker: starts the sandbox before the first response needs it."""
    reward = CodeReward(*settings)
    reward.check()
    return reward


@functools.cache
def _sandbox(server_url: str | None) -> Sandbox | SandboxServer:
    return Sandbox() if server_url is None else SandboxServer(server_url)


def extract_program(response: str) -> str | None:
    """Return the last complete Python block after the thinking, else the last complete block, else None."""
    blocks = list(_blocks(response.rpartition(_THINK_END)[2]))
    of_python = [text for language, text in blocks if language in _PYTHON]
    chosen = of_python or [text for _, text in blocks]
    return chosen[-1] if chosen else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language in lower case, text) of every fenced block that is closed."""
    blocks: list[tuple[str, str]] = []
    fence, language, lines = "", "", []
    for line in text.splitlines():
        match = _FENCE.fullmatch(line)
        if not fence:
            if match:
                fence, language, lines = match[1], match[2].lower(), []
        elif match and match[1].startswith(fence) and not match[2]:
            blocks.append((language, textwrap.dedent("\n".join(lines) + "\n")))
            fence = ""
        else:
            lines.append(line)
    return blocks
