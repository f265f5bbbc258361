"""Writes metrics to disk: one JSON line per step, and the same scalars for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.observability.trackers.tensorboard import TensorBoardEvents
from megatron_vespo.system.disk import write_atomically

# JSON has no word for these three; they are written as strings and read back as floats.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dump_json(value: Any, indent: int | None = None) -> str:
    """`value` as valid JSON at full float precision; NaN and infinities become the strings of NON_FINITE."""
    return json.dumps(_spell_non_finite(value), indent=indent, allow_nan=False)


def _spell_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: _spell_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_non_finite(entry) for entry in value]
    return value


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, oldest first: "step" (int), "time" (unix seconds) and the metrics.

    A last line that a killed run left half-written is skipped; any other bad line is a ValueError.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a JSON record ({error})") from error
        # version 0.1 wrote heldout/ for eval/
        records.append(
            {name.replace("heldout/", "eval/"): NON_FINITE.get(v, v) for name, v in record.items()}
        )
    return records


def batch_records(records: list[dict]) -> list[dict]:
    """Records of whole rollout batches; evaluations and checks between them have their own records."""
    return [record for record in records if "policy/version" in record]


def _is_before(record: dict, resume_step: int) -> bool:
    """Whether a run that resumes from `resume_step` does not write the record again.

    After the save of a step, only checks and evaluations of its weights follow; these have their own records.
    """
    checks = {"check/last_sync_logprob_difference", "eval/accuracy"} & record.keys()
    after_save = resume_step > 0 and checks and not batch_records([record])
    return record["step"] < resume_step or (record["step"] == resume_step and not after_save)


def _lines(records: Iterable[dict]) -> str:
    return "".join(dump_json(record) + "\n" for record in records)


# Gets every record: the optimizer step, Unix seconds and the metrics. It must return at once.
RecordObserver = Callable[[int, float, Mapping[str, float]], None]


class MetricsWriter:
    """Appends every step's metrics to `directory`/metrics.jsonl and, if wanted, `directory`/tensorboard.

    `resume_step` is the last step that the run keeps: points of later steps are dropped in both places. None
    starts afresh; an existing metrics.jsonl then becomes metrics.previous.jsonl. `keep_cut` appends dropped
    records to that file, because a run that goes back will write different ones.
    """

    def __init__(
        self,
        directory: Path,
        resume_step: int | None,
        keep_cut: bool = False,
        tensorboard: bool = True,
        on_record: RecordObserver | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path, previous = directory / "metrics.jsonl", directory / "metrics.previous.jsonl"
        if path.exists():
            if resume_step is None:
                path.replace(previous)
            else:
                kept, cut = [], []
                for record in read_metrics(path):
                    (kept if _is_before(record, resume_step) else cut).append(record)
                if keep_cut:
                    with previous.open("a", encoding="utf-8") as stream:
                        stream.write(_lines(cut))
                write_atomically(path, _lines(kept))
        self._lines, self._on_record = path.open("a", encoding="utf-8"), on_record
        first_step = 0 if resume_step is None else resume_step + 1
        self._events = TensorBoardEvents(directory / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records `metrics` for `step`. Both files are flushed, so that a killed run loses nothing."""
        assert not {"step", "time"} & metrics.keys(), "step and time are the record's own keys"
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        self._lines.write(dump_json({"step": step, "time": now, **values}) + "\n")
        self._lines.flush()
        if self._events is not None:
            self._events.scalars(step, now, values)
        if self._on_record is not None:
            self._on_record(step, now, values)

    def write_text(self, step: int, tag: str, markdown: str) -> None:
        """Adds a text for people to TensorBoard."""
        if self._events is not None:
            self._events.text(step, tag, markdown)

    def close(self) -> None:
        self._lines.close()
        if self._events is not None:
            self._events.close()
