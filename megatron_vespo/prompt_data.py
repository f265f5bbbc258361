"""A file of prompts, read as the flags say that training and evaluation share."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.data.prompts import PromptSet, load_prompts


def prompt_data(
    args: Namespace, path: Path, tokenizer: Any, *, overlong: Literal["skip", "error"], flag: str
) -> PromptSet:
    """ValueError as `load_prompts`; `flag` has named the file."""
    return load_prompts(
        path,
        tokenizer,
        prompt_key=args.prompt_key,
        answer_key=args.answer_key,
        answer_pattern=args.answer_pattern,
        apply_chat_template=args.apply_chat_template,
        max_prompt_tokens=args.max_prompt_tokens,
        overlong=overlong,
        flag=flag,
    )
