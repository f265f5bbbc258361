"""Runs programs on a server with SandboxFusion's API: POST /run_code."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from megatron_vespo.rewards import jail
from megatron_vespo.rewards.sandbox import Limits, SandboxError, ScriptResult
from megatron_vespo.system.http import EngineRequestError, post_json

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0  # between attempts
_REPLY_MARGIN_S = 1.0  # a reply may come so much later than the program ends
_CHECK_DEADLINE_S = 60.0
_NONCE_BYTES = 16
_JAIL = "megatron_vespo.rewards.jail"
# Makes the modules of jail/ importable on the server, and runs remote.py.
_SCRIPT = """
import sys, types
def add(name, text=None):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    if text is not None:
        exec(compile(text, name, "exec"), module.__dict__)
for name in ("megatron_vespo", "megatron_vespo.rewards", {jail!r}):
    add(name)
for name, text in {modules!r}:
    add(name, text)
sys.modules[{jail!r} + ".remote"].main({sources!r})
"""


class SandboxServer:
    """Offers what `Sandbox` offers; the server isolates and limits the programs.

    Raises:
        ValueError: the server does not run a trivial program.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._modules = _jail_modules()
        try:
            result = self.run_script("print(6 * 7)", "", Limits(), time.monotonic() + _CHECK_DEADLINE_S)
        except SandboxError as error:
            raise ValueError(str(error)) from error
        if result.stdout.strip() != b"42":
            raise ValueError(
                f"--code-sandbox-url {url}: print(6 * 7) printed {result.stdout[:60]!r}, not 42: is it a "
                "server with SandboxFusion's API, and Python?"
            )

    def run_script(self, source: str, stdin: str, limits: Limits, deadline: float) -> ScriptResult:
        """As Sandbox.run_script."""
        found = self._run(source, stdin, limits, deadline)
        if found.get("status") == "TimeLimitExceeded":
            return ScriptResult("timeout", None, b"")
        stdout = str(found.get("stdout") or "").encode(errors="replace")
        if len(stdout) >= limits.output_bytes:
            return ScriptResult("output", None, stdout[: limits.output_bytes])
        status = found.get("return_code")
        finished = found.get("status") == "Finished"
        return ScriptResult("ended", status if isinstance(status, int) else int(not finished), stdout)

    def run_tests(
        self, sources: list[str], tests: dict, limits: Limits, deadline: float, *, call_timeout_s: float,
        stop_at_failure: bool,
    ) -> list[bool]:  # fmt: skip
        """As Sandbox.run_tests."""
        nonce = secrets.token_hex(_NONCE_BYTES)
        request = {
            "nonce": nonce,
            "tests": tests,
            "call_timeout_s": call_timeout_s,
            "stop_at_failure": stop_at_failure,
        }
        script = _SCRIPT.format(jail=_JAIL, modules=self._modules, sources=sources)
        found = self._run(script, json.dumps(request), limits, deadline)
        _, _, results = str(found.get("stdout") or "").rpartition("\n" + nonce)
        return [letter == "1" for letter in results.strip()]

    def _run(self, code: str, stdin: str, limits: Limits, deadline: float) -> dict[str, Any]:
        """The server's `run_result`. Asks again until the deadline if the server itself fails."""
        pause_s, failure = _FIRST_PAUSE_S, "it did not answer"
        while (left := deadline - time.monotonic()) > 0:
            payload = {
                "code": code,
                "language": "python",
                "stdin": stdin,
                "compile_timeout": left,
                "run_timeout": min(left, limits.cpu_s),
                "memory_limit_MB": limits.memory_bytes // 2**20,
            }
            try:
                reply = post_json(self._url, "/run_code", payload, left + _REPLY_MARGIN_S)
            except EngineRequestError as error:
                failure = error.reason
                if error.status is not None and 400 <= error.status < 500 and error.status != 429:
                    break
            except ValueError as error:
                failure = f"/run_code answered no JSON: {error}"
            else:
                result = reply.get("run_result")
                if reply.get("status") in ("Success", "Failed") and isinstance(result, dict):
                    return result
                failure = f"/run_code: {reply.get('status')}: {reply.get('message')}"
            time.sleep(max(0.0, min(pause_s, deadline - time.monotonic())))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise SandboxError(f"--code-sandbox-url {self._url}: {failure}")


def _jail_modules() -> list[tuple[str, str]]:
    """(name, source) of the modules that remote.py imports, and of itself."""
    folder = Path(str(jail.__file__)).parent
    names = "kernel", "values", "program", "tester", "remote"
    return [(f"{_JAIL}.{name}", (folder / f"{name}.py").read_text(encoding="utf-8")) for name in names]
