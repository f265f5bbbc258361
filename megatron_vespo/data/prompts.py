"""Reads and tokenises prompt files, and defines the resumable order of the prompts in training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_vespo.data.located import located
from megatron_vespo.data.rows import answer_text, file_rows, lookup, messages_of, user_text
from megatron_vespo.data.tokenizer import ARGUMENTS_FLAG, ChatFormat
from megatron_vespo.types import Prompt, token_array


@dataclass(frozen=True)
class Columns:
    """Where a row has prompt and answer: a column, or a dotted path to a nested one ("reward.ground_truth").

    The prompt is a string (one user message) or a list of {"role", "content"} messages. `answer_pattern` is a
    regular expression; its one group is the reference inside the answer cell. `flags` is the common prefix
    of the flags that set these, for messages.
    """

    prompt: str
    answer: str
    answer_pattern: str | None = None
    flags: str = "--"

    def compiled_pattern(self) -> re.Pattern[str] | None:
        """Compile the pattern; ValueError if it cannot be used."""
        if self.answer_pattern is None:
            return None
        given = f"{self.flags}answer-pattern {self.answer_pattern!r}"
        try:
            pattern = re.compile(self.answer_pattern)
        except re.error as error:
            raise ValueError(f"{given} is no regular expression: {error}") from error
        if pattern.groups != 1:
            raise ValueError(f"{given} must have one group, it has {pattern.groups}")
        return pattern


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, without over-long prompts."""

    prompts: list[Prompt]
    num_overlong: int
    path: Path
    has_tools: bool = False  # whether there is a column of tools, as in chat data

    def remarks(self, max_prompt_tokens: int) -> list[str]:
        """Return remarks about the file for the user."""
        remarks = []
        if self.num_overlong:
            remarks.append(
                f"{self.path}: {self.num_overlong} prompts over --max-prompt-tokens {max_prompt_tokens} "
                "skipped"
            )
        if self.has_tools:
            remarks.append(
                f"{self.path}: the column 'tools' reaches the reward function, not the chat template; "
                f"tools that all prompts share: {ARGUMENTS_FLAG} '{{\"tools\": [...]}}'"
            )
        return remarks


def load_prompts(
    path: str | Path,
    chat_format: ChatFormat,
    columns: Columns,
    *,
    max_prompt_tokens: int,
    overlong: Literal["skip", "error"],
    flag: str,
) -> PromptSet:
    """Read a .jsonl or .parquet file and tokenise its prompts.

    Args:
        overlong: whether a prompt of more than max_prompt_tokens is left out and counted, or refused.
        flag: the flag that named the file, for messages.

    Raises:
        ValueError: one line that names the file and its wrong line (JSONL) or row (parquet), from 1.
    """
    path = Path(path)
    pattern = columns.compiled_pattern()
    prompts: list[Prompt] = []
    num_overlong, has_tools = 0, False
    for prompt_id, (where, row) in enumerate(file_rows(path, flag)):
        with located(where):
            prompt = _prompt(prompt_id, row, chat_format, columns, pattern, where)
        has_tools = has_tools or bool(prompt.metadata.get("tools"))
        if len(prompt.token_ids) > max_prompt_tokens:
            if overlong == "error":
                raise ValueError(
                    f"{where}: the prompt has {len(prompt.token_ids)} tokens, more than --max-prompt-tokens "
                    f"{max_prompt_tokens}; --overlong-prompts skip would leave it out"
                )
            num_overlong += 1
            continue
        prompts.append(prompt)

    if num_overlong and not prompts:
        raise ValueError(
            f"{path}: all {num_overlong} prompts are longer than --max-prompt-tokens {max_prompt_tokens}"
        )
    if not prompts:
        raise ValueError(f"{path}: the file is empty; {flag} needs one prompt a row")
    return PromptSet(prompts, num_overlong, path, has_tools)


def _prompt(
    prompt_id: int,
    row: dict,
    chat_format: ChatFormat,
    columns: Columns,
    pattern: re.Pattern | None,
    where: str,
) -> Prompt:
    keys = columns.prompt, columns.answer
    messages = messages_of(lookup(row, keys[0], f"{columns.flags}prompt-key", where), keys[0], where)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: {keys[0]} ends with a message of the assistant, which would give the answer away: "
            "leave that message out"
        )
    cell = lookup(row, keys[1], f"{columns.flags}answer-key", where)
    answer = answer_text(cell, keys[1], pattern, where, f"{columns.flags}answer-pattern")
    metadata = {key: value for key, value in row.items() if key not in keys}
    token_ids = token_array(chat_format.tokens(messages))
    return Prompt(prompt_id, token_ids, answer, user_text(messages), metadata)


class PromptCursor:
    """Endless iteration over the prompts, reshuffled every epoch.

    The order depends only on seed and epoch, and `consumed` is the whole state:
    `PromptCursor(prompts, seed, consumed=k)` continues after the first k prompts.
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
        """Epochs completed so far, e.g. 1.5."""
        return self.consumed / len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """Return the next n prompts; they may span several epochs."""
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
    # numpy keeps only the raw Philox words the same in all versions, not permutation().
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_prompts), kind="stable")
