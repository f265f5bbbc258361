"""Prompt files into tokenised prompts, and the resumable order in which training goes through them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_vespo.data.rows import answer_text, file_rows, lookup, messages_of, user_text
from megatron_vespo.types import Prompt


@dataclass(frozen=True)
class PromptSet:
    """What one prompt file holds, over-long prompts left out."""

    prompts: list[Prompt]
    num_overlong: int
    path: Path


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    prompt_key: str,
    answer_key: str,
    answer_pattern: str | None,
    apply_chat_template: bool,
    max_prompt_tokens: int,
    overlong: Literal["skip", "error"],
    flag: str,
) -> PromptSet:
    """Read a .jsonl or .parquet file and tokenise its prompts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_key, answer_key: a column, or a dotted path into nested ones ("reward_model.ground_truth").
            The prompt is a string (one user message) or a list of {"role", "content"} messages.
        answer_pattern: regular expression whose one group is the reference inside the answer cell.
        overlong: what happens to a prompt of more than max_prompt_tokens: left out and counted, or refused.
        flag: the one that named the file, for messages.

    Raises:
        ValueError: one line with the file and the line (JSONL) or row (parquet), from 1, that is wrong.
    """
    path = Path(path)
    pattern = _compile_pattern(answer_pattern)
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: --no-chat-template takes prompts as they are")

    prompts: list[Prompt] = []
    num_overlong = 0
    for prompt_id, (where, row) in enumerate(file_rows(path, flag)):
        messages = messages_of(lookup(row, prompt_key, "--prompt-key", where), prompt_key, where)
        answer = answer_text(lookup(row, answer_key, "--answer-key", where), answer_key, pattern, where)
        token_ids = _tokenize(messages, tokenizer, apply_chat_template, where)
        if len(token_ids) > max_prompt_tokens:
            if overlong == "error":
                raise ValueError(
                    f"{where}: the prompt has {len(token_ids)} tokens, more than --max-prompt-tokens "
                    f"{max_prompt_tokens}; --overlong-prompts skip would leave it out"
                )
            num_overlong += 1
            continue
        metadata = {key: value for key, value in row.items() if key not in (prompt_key, answer_key)}
        prompts.append(Prompt(prompt_id, token_ids, answer, user_text(messages), metadata))

    if num_overlong and not prompts:
        raise ValueError(
            f"{path}: all {num_overlong} prompts are longer than --max-prompt-tokens {max_prompt_tokens}"
        )
    if not prompts:
        raise ValueError(f"{path}: the file is empty; {flag} needs one prompt a row")
    return PromptSet(prompts, num_overlong, path)


class PromptCursor:
    """Endless pass over the prompts, reshuffled every epoch.

    The order depends on seed and epoch only and `consumed` is the whole state:
    `PromptCursor(prompts, seed, consumed=k)` goes on where a cursor stood that had handed out k prompts.
    """

    def __init__(self, prompts: list[Prompt], seed: int, consumed: int = 0) -> None:
        assert prompts and consumed >= 0, (len(prompts), consumed)
        self._prompts = prompts
        self._seed = seed
        self._shuffled_epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self.consumed = consumed

    @property
    def epoch(self) -> float:
        """Passes over the prompt set so far, e.g. 1.5."""
        return self.consumed / len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; they may come from two epochs or more."""
        taken = []
        for position in range(self.consumed, self.consumed + n):
            epoch, index = divmod(position, len(self._prompts))
            if epoch != self._shuffled_epoch:
                self._order = _epoch_order(len(self._prompts), self._seed, epoch)
                self._shuffled_epoch = epoch
            taken.append(self._prompts[self._order[index]])
        self.consumed += n
        return taken


def _epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    # Raw Philox words are the one random stream that numpy keeps fixed across versions; permutation() is not.
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_prompts), kind="stable")


def _compile_pattern(answer_pattern: str | None) -> re.Pattern[str] | None:
    if answer_pattern is None:
        return None
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise ValueError(f"--answer-pattern {answer_pattern!r} is no regular expression: {error}") from error
    if pattern.groups != 1:
        raise ValueError(f"--answer-pattern {answer_pattern!r} must have one group, it has {pattern.groups}")
    return pattern


def _tokenize(messages: list[dict], tokenizer: Any, apply_chat_template: bool, where: str) -> list[int]:
    if apply_chat_template:
        from jinja2 import TemplateError

        try:
            token_ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses the messages: {error}") from error
    elif len(messages) == 1:
        token_ids = tokenizer.encode(messages[0]["content"])
    else:
        raise ValueError(f"{where}: --no-chat-template takes one message, this prompt has {len(messages)}")
    if not token_ids:
        raise ValueError(f"{where}: the tokenizer makes no tokens of the prompt")
    return list(token_ids)
