"""Flags of `megatron-vespo evaluate`. Those shared with training come from it: one meaning, one default."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from megatron_vespo.arguments.checks import check_positive, check_seed
from megatron_vespo.arguments.code_rewards import CODE_REWARD_FLAGS, check_code_reward
from megatron_vespo.arguments.engines import check_retries
from megatron_vespo.arguments.environment import POSITIVE as POSITIVE_OF_ENVIRONMENTS
from megatron_vespo.arguments.environment import EnvironmentSettings, check_environment_flags
from megatron_vespo.arguments.evaluation import check_temperature
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.arguments.rewards import resolved_reward_function
from megatron_vespo.arguments.training_flags import add_vespo_arguments
from megatron_vespo.commands.evaluate.options import EvaluateOptions
from megatron_vespo.rollout.server_arguments import parse_sglang_flags
from megatron_vespo.system.paths import expanded, user_path

DESCRIPTION = """\
avg@k and pass@k of a checkpoint on prompt sets, with 95% intervals over prompts.

An HF folder or a Megatron checkpoint (converted first) gets SGLang engines of its own, which are handed
--sglang-<flag>; --engine-url asks engines that run. Finished prompts are in --output-dir:
the same command goes on where it was stopped.
"""
# training's flags, by the group in which this command shows them
SHARED = {
    "prompts": (
        "--prompt-key", "--answer-key", "--answer-pattern", "--no-chat-template",
        "--chat-template-arguments", "--max-prompt-tokens",
    ),
    "multi-turn responses": (
        "--environment", "--max-turns", "--max-turn-tokens", "--environment-timeout", "--generate-function",
    ),
    "completions and rewards": (
        "--max-completion-tokens", "--generate-timeout", "--max-request-retries",
        "--reward-function", "--turn-rewards", "--reward-workers", "--reward-timeout", "--reward-memory-gb",
        *CODE_REWARD_FLAGS,
    ),
    "engines": (
        "--rollout-engines", "--rollout-port", "--engine-start-timeout", "--engine-health-timeout",
        "--engine-restarts", "--min-engines", "--ray-address",
    ),
}  # fmt: skip
_POSITIVE = (
    "num_completions max_prompt_tokens max_completion_tokens generate_timeout reward_workers "
    "reward_timeout reward_memory_gb rollout_engines engine_start_timeout engine_health_timeout min_engines "
    "num_prompts"
).split()


def parse_args(argv: list[str]) -> EvaluateOptions:
    """Raises ValueError for a user's mistake."""
    sglang_flags, rest = parse_sglang_flags(argv)
    args = make_parser().parse_args(rest)
    data = _named_files(args.data)
    options = EvaluateOptions.of(
        args,
        data=data,
        sglang_flags=tuple(sglang_flags),
        reward_function=resolved_reward_function(args),
    )
    check_positive(options, [*_POSITIVE, *POSITIVE_OF_ENVIRONMENTS])
    check_environment_flags(EnvironmentSettings.of(options))
    check_seed(options.seed)
    check_code_reward(options)
    _check_sampling(options)
    _check_engines(options)
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="megatron-vespo evaluate",
        usage="megatron-vespo evaluate --checkpoint DIR --data NAME=FILE ... --output-dir DIR [flags]",
        description=DESCRIPTION,
    )
    add = parser.add_argument_group("what").add_argument
    add("--checkpoint", type=user_path, required=True, metavar="DIR",
        help="HF folder or Megatron checkpoint; with --engine-url only its tokenizer is read")  # fmt: skip
    add("--hf-config", type=user_path, metavar="DIR",
        help="HF folder of a Megatron checkpoint that another program saved")  # fmt: skip
    add("--engine-url", nargs="+", metavar="URL", help="engines that run already: no others are started")
    add("--api-key-env", metavar="NAME", help="environment variable that holds their API key")
    add("--data", nargs="+", required=True, metavar="NAME=FILE", action="extend",
        help="prompt sets, JSONL or parquet")  # fmt: skip
    add("--output-dir", type=user_path, required=True, metavar="DIR")
    _add_shared(parser)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    training = add_vespo_arguments(argparse.ArgumentParser(add_help=False))
    actions = {flag: action for action in training._actions for flag in action.option_strings}
    groups = {}
    for title, flags in SHARED.items():
        groups[title] = parser.add_argument_group(title, "as in training" if title == "engines" else None)
        for flag in flags:
            groups[title]._add_action(actions[flag])
    add = groups["prompts"].add_argument
    add("--num-prompts", type=int, metavar="N", help="of each set, the first ones; default: all")
    add = groups["completions and rewards"].add_argument
    add("--num-completions", type=int, default=8, metavar="K", help="completions per prompt, K of avg@K")
    add("--temperature", type=float, default=1.0, help="0: greedy")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    add("--top-k", type=int, default=-1, help="sample from so many tokens; -1: all")
    add("--pass-reward", type=float, default=1.0, metavar="R",
        help="a completion is correct, for pass@k, if it earns so much")  # fmt: skip
    add("--seed", type=int, default=1)
    add("--save-responses", action="store_true", help="keep their text, and their turns if there are any")


def _named_files(given: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not (equals and name and path):
            raise ValueError(f"--data {entry}: write NAME=FILE, for example aime24=aime24.jsonl")
        if name in files:
            raise ValueError(f"--data {entry}: there is a set {name!r} already; give each its own name")
        files[name] = Path(expanded(path))
    return files


def _check_sampling(options: EvaluateOptions) -> None:
    check_temperature("--temperature", options.temperature, options.num_completions)
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p {options.top_p:g}: must be above 0, at most 1")
    if not math.isfinite(options.pass_reward):
        raise ValueError(f"--pass-reward {options.pass_reward:g}: must be finite")
    if options.top_k != -1 and options.top_k < 1:
        raise ValueError(f"--top-k {options.top_k}: must be positive, or -1 for all tokens")


def _check_engines(options: EvaluateOptions) -> None:
    if not options.checkpoint.is_dir():
        raise ValueError(f"--checkpoint {options.checkpoint}: no such folder")
    if options.hf_config is not None and not options.hf_config.is_dir():
        raise ValueError(f"--hf-config {options.hf_config}: no such folder")
    if options.engine_url:
        if options.sglang_flags:
            raise ValueError(
                f"--sglang-{options.sglang_flags[0].removeprefix('--')} is for engines that are started; "
                "those at --engine-url run already"
            )
        for url in options.engine_url:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"--engine-url {url}: write http://HOST:PORT")
    elif options.api_key_env:
        raise ValueError("--api-key-env is for --engine-url: engines that are started need no key")
    if options.api_key_env and not os.environ.get(options.api_key_env):
        raise ValueError(f"--api-key-env {options.api_key_env}: no such environment variable, or it is empty")
    check_retries(options.max_request_retries)
    if options.engine_restarts < 0:
        raise ValueError(f"--engine-restarts is {options.engine_restarts}, must be positive, or 0: none")
    if options.min_engines > options.rollout_engines:
        raise ValueError(
            f"--min-engines is {options.min_engines}, more than --rollout-engines {options.rollout_engines}"
        )
