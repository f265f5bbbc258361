"""Flags of `--reward-function code`, their defaults and checks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_vespo.arguments.checks import check_positive
from megatron_vespo.rewards.code import CodeReward
from megatron_vespo.system.http import is_http_url
from megatron_vespo.system.settings import Settings

CODE_REWARD_FLAGS = (
    "--code-reward", "--code-timeout", "--code-test-timeout", "--code-memory-mb", "--code-sandbox-url",
)  # fmt: skip


def add_code_reward_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "code rewards",
        "--code-reward and limits of --reward-function code: see docs/guides/code-rewards.md",
    ).add_argument
    add("--code-reward", choices=("all", "share"), default="all",
        help="1 if all tests pass, else 0; or the share that passes")  # fmt: skip
    add("--code-timeout", type=float, default=CodeReward.timeout_s, metavar="SECONDS",
        help="for all tests of a response; less than --reward-timeout")  # fmt: skip
    add("--code-test-timeout", type=float, default=CodeReward.test_timeout_s, metavar="SECONDS",
        help="for each test: processor time and elapsed time")  # fmt: skip
    add("--code-memory-mb", type=int, default=CodeReward.memory_mb, metavar="MiB",
        help="memory that a program may allocate")  # fmt: skip
    add("--code-sandbox-url", metavar="URL",
        help="a server with SandboxFusion's /run_code; default: Linux namespaces")  # fmt: skip


def check_code_reward(args: Any) -> None:
    """`args` are parsed flags; those of code rewards matter only with that reward function."""
    if args.reward_function != "code":
        return
    check_positive(args, ("code_timeout", "code_test_timeout", "code_memory_mb"))
    if not args.code_timeout < args.reward_timeout:
        raise ValueError(
            f"--code-timeout {args.code_timeout:g} must be less than --reward-timeout "
            f"{args.reward_timeout:g}: that one ends the sandbox itself"
        )
    if args.code_test_timeout > args.code_timeout:
        raise ValueError(
            f"--code-test-timeout {args.code_test_timeout:g} must not be more than --code-timeout "
            f"{args.code_timeout:g}, the time of all tests"
        )
    url = args.code_sandbox_url
    if url is not None and not is_http_url(url):
        raise ValueError(f"--code-sandbox-url {url}: write http://HOST:PORT")


@dataclass(frozen=True)
class CodeRewardSettings(Settings):
    _prefix = "code_"

    reward: str  # "all" or "share"
    timeout: float  # seconds, for all tests
    test_timeout: float  # seconds, for each test
    memory_mb: int
    sandbox_url: str | None

    def function(self) -> CodeReward:
        return CodeReward(
            self.timeout, self.test_timeout, self.memory_mb, self.reward == "share", self.sandbox_url
        )
