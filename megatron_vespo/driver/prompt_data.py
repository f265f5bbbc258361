"""Files of prompts, read as the flags say that training and evaluation share."""

from __future__ import annotations

from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.data.prompts import Columns, PromptSet, load_prompts
from megatron_vespo.data.tokenizer import ChatFormat


def chat_format(args: Namespace, tokenizer: Any, date: datetime) -> ChatFormat:
    """ValueError where the tokenizer's chat template does not fit the flags."""
    return ChatFormat(tokenizer, args.apply_chat_template, args.chat_template_arguments, date)


def prompt_data(
    args: Namespace, path: Path, chat_format: ChatFormat, *, overlong: Literal["skip", "error"], flag: str
) -> PromptSet:
    """The prompts of training or of an evaluation, ValueError as `load_prompts`."""
    columns = Columns(args.prompt_key, args.answer_key, args.answer_pattern)
    return load_prompts(
        path, chat_format, columns, max_prompt_tokens=args.max_prompt_tokens, overlong=overlong, flag=flag
    )


def eval_data(args: Namespace, chat_format: ChatFormat) -> PromptSet:
    """The prompts of --eval-data, in columns of their own where flags name some."""
    columns = Columns(
        args.eval_prompt_key or args.prompt_key,
        args.eval_answer_key or args.answer_key,
        args.answer_pattern if args.eval_answer_pattern is None else args.eval_answer_pattern,
        "--eval-",
    )
    return load_prompts(
        args.eval_data, chat_format, columns, max_prompt_tokens=args.max_prompt_tokens,
        overlong=args.overlong_prompts, flag="--eval-data",
    )  # fmt: skip
