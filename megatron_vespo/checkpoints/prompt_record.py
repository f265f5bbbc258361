"""Records the prompts that a run trains on in its checkpoints: a resumed run must have the same prompts.

    prompts.npz     rows int64 [P]                  of the prompt file, from 0; P prompts in the file's order
                    contents, tokens uint64 [P]     hashes of question and answer, and of the token ids
                    seed int64, date str            what the order follows from; what chat templates read
                    eval_prompts str            digest of the held-out prompts, empty without

The prompt file may move, and may have other columns. The date is that of the run's first start, so a chat
template that prints the date makes the same prompts on every day of the run.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.checkpoints.names import PROMPTS_NAME
from megatron_vespo.data.located import located
from megatron_vespo.data.tokenizer import ARGUMENTS_FLAG
from megatron_vespo.types import Prompt


@dataclass(frozen=True)
class PromptRecord:
    """The content of prompts.npz, see the module."""

    rows: np.ndarray
    contents: np.ndarray
    tokens: np.ndarray
    seed: int
    date: datetime
    eval_prompts: str

    @classmethod
    def of(
        cls, prompts: Sequence[Prompt], seed: int, date: datetime, eval_prompts: Sequence[Prompt] = ()
    ) -> PromptRecord:
        return cls(
            np.array([prompt.prompt_id for prompt in prompts], np.int64),
            # an answer may contain half of a surrogate pair
            _hashes(f"{prompt.text}\0{prompt.answer}".encode(errors="surrogatepass") for prompt in prompts),
            _hashes(prompt.token_ids.astype(np.int64).tobytes() for prompt in prompts),
            seed,
            date,
            digest(eval_prompts) if eval_prompts else "",
        )

    def encode(self) -> bytes:
        fields: dict[str, Any] = {**vars(self), "date": self.date.isoformat()}
        file = io.BytesIO()
        np.savez_compressed(file, **fields)
        return file.getvalue()

    def check_same(self, now: PromptRecord, folder: Path, path: Path) -> list[str]:
        """ValueError if `now`, made from the file `path`, has other prompts than this checkpoint's record.

        Returns messages for the user about differences that do not stop the run.
        """
        difference = self._difference(now, path)
        if difference is not None:
            raise ValueError(
                f"--load {folder} is of a run with other prompts: {difference}; give the same again, or "
                "begin a new run with its policy (megatron-vespo convert megatron-to-hf)"
            )
        if self.eval_prompts and now.eval_prompts and self.eval_prompts != now.eval_prompts:
            return [f"the held-out prompts are others than before {folder}: do not compare their accuracies"]
        return []

    def _difference(self, now: PromptRecord, path: Path) -> str | None:
        if now.seed != self.seed:
            return f"--seed orders them, it was {self.seed} and is {now.seed}"
        data, size = f"--prompt-data {path}", len(now.rows)
        if size != len(self.rows):
            return f"{data} has {size} within --max-prompt-tokens, there were {len(self.rows)}"
        others = np.flatnonzero((now.rows != self.rows) | (now.contents != self.contents))
        if others.size:
            return f"{data}: row {now.rows[others[0]] + 1} is another one ({others.size} of {size} are)"
        others = np.flatnonzero(now.tokens != self.tokens)
        if others.size:
            return (
                f"{data}: row {now.rows[others[0]] + 1} has the same question and answer but other tokens "
                f"({others.size} of {size} have): another tokenizer, chat template, {ARGUMENTS_FLAG} or "
                "system message"
            )
        return None


def read_record(folder: Path) -> PromptRecord | None:
    """The record of a checkpoint's folder, or None without one. ValueError for a broken record."""
    path = folder / PROMPTS_NAME
    if not path.is_file():
        return None
    with located(f"--load {path}: broken"), np.load(path, allow_pickle=False) as stored:
        evaluated = "eval_prompts" if "eval_prompts" in stored else "heldout"  # its former name
        return PromptRecord(
            stored["rows"], stored["contents"], stored["tokens"], int(stored["seed"]),
            datetime.fromisoformat(str(stored["date"])), str(stored[evaluated]),
        )  # fmt: skip


def digest(prompts: Sequence[Prompt]) -> str:
    """The digest of the prompts' token ids."""
    total = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        total.update(np.array([len(prompt.token_ids), *prompt.token_ids], np.int64).tobytes())
    return total.hexdigest()


def _hashes(contents: Iterable[bytes]) -> np.ndarray:
    hashes = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(hashes, np.uint64)
