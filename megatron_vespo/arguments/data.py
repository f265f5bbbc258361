"""Flags of the model and of the training prompts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.arguments.checks import json_object
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.settings import Settings


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--hf-checkpoint", type=user_path, metavar="DIR", help="HF checkpoint to start from (required)")
    add("--prompt-data", type=user_path, metavar="FILE", help="training prompts, JSONL or parquet (required)")
    add("--prompt-key", default="question", help="column of the prompt, string or chat; dots go deeper")
    add("--answer-key", default="answer", help="column of the reference answer; dots go deeper")
    add(
        "--answer-pattern",
        metavar="REGEX",
        help=r"regular expression whose group 1 is the answer, e.g. '####\s*(.+)'",
    )
    add(
        "--no-chat-template",
        dest="apply_chat_template",
        action="store_false",
        help="use the prompt text without a chat template",
    )
    add("--chat-template-arguments", type=json_object, default={}, metavar="JSON",
        help="an object, e.g. '{\"enable_thinking\": false}'")  # fmt: skip
    add(
        "--max-prompt-tokens",
        type=int,
        default=1024,
        help="longest prompt; longer ones: see --overlong-prompts",
    )
    add(
        "--overlong-prompts",
        choices=("skip", "error"),
        default="skip",
        help="what happens to prompts that are too long",
    )


@dataclass(frozen=True)
class PromptSettings(Settings):
    """How prompts are read from their files, in training and evaluation."""

    prompt_key: str
    answer_key: str
    answer_pattern: str | None
    apply_chat_template: bool
    chat_template_arguments: Mapping[str, Any]
    max_prompt_tokens: int


@dataclass(frozen=True)
class DataSettings(PromptSettings):
    """How training prompts are read."""

    hf_checkpoint: Path
    prompt_data: Path | None
    overlong_prompts: Literal["skip", "error"]
    vocab_size: int  # of the model
