"""Reads prompt files, by the flags that training and evaluation share."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.arguments.data import DataSettings, PromptSettings
from megatron_vespo.arguments.evaluation import EvalSettings
from megatron_vespo.data.prompts import Columns, PromptSet, load_prompts
from megatron_vespo.data.tokenizer import ChatFormat


def chat_format(settings: PromptSettings, tokenizer: Any, date: datetime) -> ChatFormat:
    """The chat format that the flags ask for. ValueError if the chat template does not fit them."""
    arguments = settings.chat_template_arguments
    return ChatFormat(tokenizer, settings.apply_chat_template, arguments, date)


def prompt_data(
    settings: PromptSettings,
    path: Path,
    chat_format: ChatFormat,
    *,
    overlong: Literal["skip", "error"],
    flag: str,
) -> PromptSet:
    """The prompts of training or of an evaluation. Raises ValueError like `load_prompts`."""
    columns = Columns(settings.prompt_key, settings.answer_key, settings.answer_pattern)
    most = settings.max_prompt_tokens
    return load_prompts(path, chat_format, columns, max_prompt_tokens=most, overlong=overlong, flag=flag)


def eval_data(settings: DataSettings, evaluation: EvalSettings, chat_format: ChatFormat) -> PromptSet:
    """The prompts of --eval-data. The --eval-*-key flags replace training's column names."""
    assert evaluation.data is not None
    pattern = evaluation.answer_pattern
    columns = Columns(
        evaluation.prompt_key or settings.prompt_key,
        evaluation.answer_key or settings.answer_key,
        settings.answer_pattern if pattern is None else pattern,
        "--eval-",
    )
    return load_prompts(
        evaluation.data, chat_format, columns, max_prompt_tokens=settings.max_prompt_tokens,
        overlong=settings.overlong_prompts, flag="--eval-data",
    )  # fmt: skip
