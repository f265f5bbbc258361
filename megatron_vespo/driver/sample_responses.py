"""Writes a few responses of every optimizer step with their log W to sample-responses.jsonl, for people.

Each line is a record of `response_records` with these keys before it:

    {"step": 12, "why": "largest log W", "prompt_id": 7, "prompt": "6 * 7 = ?", "answer": "42",
     "advantage": -0.5, "log_w": 3.1, "weight": 0.02}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.data.response_records import response_records
from megatron_vespo.data.sample_advantages import mean_advantage
from megatron_vespo.driver.trained_step import TrainedStep
from megatron_vespo.observability.metrics import dump_json
from megatron_vespo.system.disk import write_atomically

FILE_NAME = "sample-responses.jsonl"
MIN_STEPS = 50  # that write samples, and less than twice as many; all steps of a shorter run


class SampleResponses:
    """Observes a run's steps; `on_rows` gets the rows that were written.

    `resume_step` is the last step whose rows are kept; None starts afresh.
    """

    def __init__(
        self,
        output_dir: Path,
        tokenizer: Any,
        total_steps: int,
        resume_step: int | None,
        on_rows: Callable[[int, list[dict[str, Any]]], None] | None = None,
    ):
        self._path, self._tokenizer, self._on_rows = output_dir / FILE_NAME, tokenizer, on_rows
        self._interval = max(1, total_steps // MIN_STEPS)
        self._total_steps = total_steps
        kept = [] if resume_step is None else read_sample_responses(self._path)
        kept = [row for row in kept if row["step"] <= (resume_step or 0)]
        write_atomically(self._path, "".join(dump_json(row) + "\n" for row in kept))

    def __call__(self, step: TrainedStep) -> None:
        if step.step % self._interval and step.step != self._total_steps:
            return
        chosen = chosen_samples(step)
        records = response_records(self._tokenizer, [step.completions[i] for i in chosen])
        rows = [_row(step, i, why) | record for (i, why), record in zip(chosen.items(), records, strict=True)]
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write("".join(dump_json(row) + "\n" for row in rows))
        if self._on_rows is not None:
            self._on_rows(step.step, rows)


def chosen_samples(step: TrainedStep) -> dict[int, str]:
    """Return index -> why of the samples worth a look, at most four."""
    log_w, rewards = step.result["log_w"], np.array([sample.reward for sample in step.samples])
    wanted = (
        (int(np.argmax(log_w)), "largest log W"),
        (int(np.argmin(log_w)), "smallest log W"),
        (int(np.argmax(rewards)), "highest reward"),
        (int(np.argmin(rewards)), "lowest reward"),
    )
    chosen: dict[int, str] = {}
    for index, why in wanted:
        chosen.setdefault(index, why)
    return chosen


def read_sample_responses(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the file, oldest first, without a half-written last line; none if it is missing."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _row(step: TrainedStep, index: int, why: str) -> dict[str, Any]:
    prompt, sample = step.completions[index].prompt, step.samples[index]
    return {
        "step": step.step,
        "why": why,
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "advantage": mean_advantage(sample),
        "log_w": float(step.result["log_w"][index]),
        "weight": float(step.result["weight"][index]),
    }
