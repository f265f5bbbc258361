"""Prompt files into tokenised prompts, and the resumable order in which training goes through them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_vespo.data.jsonl import jsonl_rows, kind
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
) -> PromptSet:
    """Read a .jsonl or .parquet file and tokenise its prompts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_key, answer_key: a column, or a dotted path into nested ones ("reward_model.ground_truth").
            The prompt is a string (one user message) or a list of {"role", "content"} messages.
        answer_pattern: regular expression whose one group is the reference inside the answer cell.
        overlong: what happens to a prompt of more than max_prompt_tokens: left out and counted, or refused.

    Raises:
        ValueError: one line with the file and the line (JSONL) or row (parquet), from 1, that is wrong.
    """
    path = Path(path)
    pattern = _compile_pattern(answer_pattern)
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: --no-chat-template takes prompts as they are")

    prompts: list[Prompt] = []
    num_overlong = 0
    for prompt_id, (where, row) in enumerate(_rows(path)):
        messages = _messages(_lookup(row, prompt_key, "--prompt-key", where), prompt_key, where)
        answer = _answer(_lookup(row, answer_key, "--answer-key", where), answer_key, pattern, where)
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
        prompts.append(Prompt(prompt_id, token_ids, answer, _user_text(messages), metadata))

    if num_overlong and not prompts:
        raise ValueError(
            f"{path}: all {num_overlong} prompts are longer than --max-prompt-tokens {max_prompt_tokens}"
        )
    if not prompts:
        raise ValueError(f"{path}: the file is empty; --prompt-data needs one prompt a row")
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


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, row); `where` starts error messages, e.g. "train.jsonl line 3"."""
    readers = {".jsonl": jsonl_rows, ".parquet": _parquet_rows}
    if not path.exists():
        raise ValueError(f"--prompt-data {path}: no such file")
    if path.is_dir():
        raise ValueError(f"--prompt-data {path}: is a folder; name one .jsonl or .parquet file in it")
    if path.suffix not in readers:
        raise ValueError(f"--prompt-data {path}: must be a .jsonl or .parquet file")
    return readers[path.suffix](path)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error
    with file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row


def _lookup(row: dict, key: str, flag: str, where: str) -> Any:
    """The cell `key`, which may be a column name with dots in it or a path through nested objects."""
    if key in row:
        return row[key]
    cell: Any = row
    for depth, part in enumerate(parts := key.split(".")):
        if not isinstance(cell, dict):
            parent = ".".join(parts[:depth])
            raise ValueError(f"{where}: {flag} {key}: {parent} is {kind(cell)}, not an object")
        if part not in cell:
            near = difflib.get_close_matches(part, cell, n=1)
            raise ValueError(
                f"{where}: no key {part!r} ({flag} {key}); the keys are {', '.join(map(str, cell)) or 'none'}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        cell = cell[part]
    return cell


def _messages(cell: Any, key: str, where: str) -> list[dict]:
    if isinstance(cell, str):
        cell = [{"role": "user", "content": cell}]
    if not isinstance(cell, list):
        raise ValueError(f"{where}: {key} must be a string or a list of chat messages, it is {kind(cell)}")
    for message in cell:
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(
                f"{where}: each message of {key} must be an object of strings 'role' and 'content'"
            )
    if not cell or not cell[-1]["content"].strip():
        raise ValueError(f"{where}: {key} is an empty prompt")
    # Parquet fills absent fields with None, which chat templates read as present.
    return [{name: value for name, value in message.items() if value is not None} for message in cell]


def _answer(cell: Any, key: str, pattern: re.Pattern[str] | None, where: str) -> str:
    if isinstance(cell, float) and math.isfinite(cell) and cell.is_integer():
        cell = int(cell)  # data sets stored through pandas say 14.0 where they mean 14
    if isinstance(cell, bool) or not isinstance(cell, str | int | float) or cell != cell:
        raise ValueError(f"{where}: {key} must be a string or a number, it is {kind(cell)}")
    answer = str(cell)
    if pattern is not None:
        match = pattern.search(answer)
        if match is None or match.group(1) is None:
            raise ValueError(
                f"{where}: --answer-pattern {pattern.pattern!r} finds nothing in {key} {answer[-60:]!r}"
            )
        answer = match.group(1)
    if not answer.strip():
        raise ValueError(f"{where}: {key} is an empty answer")
    return answer.strip()


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


def _user_text(messages: list[dict]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), messages[-1]["content"])
