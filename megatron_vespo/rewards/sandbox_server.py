"""Runs programs on a server with SandboxFusion's API."""

from __future__ import annotations

from megatron_vespo.rewards.sandbox import Limits, ScriptResult


class SandboxServer:
    """Offers what `Sandbox` offers; the server isolates the programs."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def run_script(self, source: str, stdin: str, limits: Limits, deadline: float) -> ScriptResult:
        raise NotImplementedError

    def run_tests(
        self, source: str, tests: dict, limits: Limits, deadline: float, *, call_timeout_s: float,
        stop_at_failure: bool,
    ) -> list[bool]:  # fmt: skip
        raise NotImplementedError
