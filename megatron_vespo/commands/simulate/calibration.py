"""Measures from a run's own files how long its phases take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.commands.simulate.lengths import Recorded
from megatron_vespo.commands.simulate.rates import Cost, EngineRates, Rates
from megatron_vespo.data.rollout_file import recorded_lengths
from megatron_vespo.observability.metrics import batch_records, read_metrics

LOOP = ("generate", "reward", "log-probs", "train", "sync", "evaluate", "save")  # phases of the loop


@dataclass(frozen=True)
class Measured:
    """Measurements of a run. `seconds`: from its first phase, a weight sync, to the end of its last one."""

    rates: Rates | None  # None: asynchronous; the cost of each side alone is unknown
    lengths: Recorded
    num_engines: int
    trainer_ranks: int
    seconds: float
    num_batches: int
    steps_per_rollout: int


def measure(folder: Path, rollouts: Path | None = None) -> Measured:
    """Measures the output folder of a finished run; `rollouts` replaces the record that its summary names."""
    summary = _json(folder / "summary.json")
    if not {"layout", "paths"} <= summary.keys():
        raise ValueError(f"{folder / 'summary.json'}: not what a run has written")
    if rollouts is None and "rollouts" not in summary["paths"]:
        raise ValueError(
            f"{folder}: how long its single responses were is not recorded; run it with --save-rollouts"
        )
    lengths = Recorded(*recorded_lengths(rollouts or Path(summary["paths"]["rollouts"])))
    phases = driver_phases(folder / "trace.json")
    records = batch_records(read_metrics(folder / "metrics.jsonl"))
    num, layout = len(records), summary["layout"]
    if not num or len(lengths.prompts) % num or not phases:
        raise ValueError(f"{folder}: {num} batches in metrics.jsonl, {len(lengths.prompts)} recorded groups")
    start, end = min(start for _, start, _ in phases), max(end for _, _, end in phases)
    engines, ranks = layout["engines"], layout["trainer_ranks"]
    rates = None
    if "staleness/total_mean" not in records[0]:
        rates = _rates(phases, lengths, num, engines, ranks, end - start)
    steps = sum(name == "train" for name, _, _ in phases)
    return Measured(rates, lengths, engines, ranks, end - start, num, steps // num)


def driver_phases(path: Path) -> list[tuple[str, float, float]]:
    """(name, start, end) of the loop's phases, in seconds, from a trace whose end may be missing."""
    events = _json(path, may_be_open=True)
    return [
        (event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event.get("ph") == "X" and event["pid"] == 0 and event["name"] in LOOP
    ]


def fit(seconds: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares fit of `sizes` [n, k] @ c to `seconds` [n], with c [k] non-negative. Returns c, and how
    much longer the first call took. The first call is not fitted: it compiles, allocates, warms up.
    """
    later, sizes_later = (seconds[1:], sizes[1:]) if len(seconds) > 1 else (seconds, sizes)
    best, least = np.zeros(sizes.shape[1]), np.inf
    for chosen in range(1, 2 ** sizes.shape[1]):  # all sets of columns: there are two
        columns = [k for k in range(sizes.shape[1]) if chosen >> k & 1]
        solved = np.linalg.lstsq(sizes_later[:, columns], later, rcond=None)[0]
        error = float(np.square(sizes_later[:, columns] @ solved - later).sum())
        if (solved >= 0).all() and error < least:
            best, least = np.zeros(sizes.shape[1]), error
            best[columns] = solved
    return best, max(float(seconds[0] - sizes[0] @ best), 0.0)


def _rates(
    phases: list[tuple[str, float, float]],
    lengths: Recorded,
    num_batches: int,
    engines: int,
    ranks: int,
    total: float,
) -> Rates:
    seconds = {name: np.array([end - start for n, start, end in phases if n == name]) for name in LOOP}
    for name in ("generate", "reward", "log-probs"):
        if len(seconds[name]) != num_batches or len(seconds["train"]) % num_batches:
            raise ValueError(
                f"{len(seconds[name])} phases {name!r} of {num_batches} batches: calibrate on a whole run, "
                "not resumed and without --dynamic-sampling"
            )
    responses = lengths.completions.reshape(num_batches, -1)
    tokens = lengths.prompts.reshape(num_batches, -1).sum(1) * lengths.completions.shape[1] + responses.sum(1)
    steps = len(seconds["train"]) // num_batches
    train = seconds["train"].reshape(num_batches, steps).sum(1)
    # no file has the prefill speed: assume that of the trainer's forward pass, per rank
    passes = slice(1, None) if num_batches > 1 else slice(None)
    prefill = float(tokens[passes].sum() / seconds["log-probs"][passes].sum()) / ranks
    # All requests of a batch run at once, r(v) of them at token v. Then a + b r(v), summed over v, is
    # a times the longest response + b times all tokens.
    sizes = np.stack([responses.max(1), responses.sum(1) / engines], 1)
    decode, first = fit(seconds["generate"] - (tokens - responses.sum(1)) / engines / prefill, sizes)
    ones = np.ones(num_batches)
    known = sum(float(values.sum()) for values in seconds.values())
    return Rates(
        engine=EngineRates(Cost(*decode.tolist(), first), prefill),  # pyright: ignore[reportCallIssue]
        log_probs=_cost(seconds["log-probs"], np.stack([ones, tokens], 1)),
        train=_cost(train, np.stack([steps * ones, tokens], 1)),
        sync=_cost(seconds["sync"], np.ones((len(seconds["sync"]), 1))),
        save=_cost(seconds["save"], np.ones((len(seconds["save"]), 1))) if len(seconds["save"]) else Cost(),
        reward=Cost(0.0, *_each(seconds["reward"], responses.shape[1])),
        other=Cost((total - known) / num_batches),
    )


def _cost(seconds: np.ndarray, sizes: np.ndarray) -> Cost:
    found, first = fit(seconds, sizes)
    return Cost(float(found[0]), float(found[1]) if len(found) > 1 else 0.0, first)


def _each(seconds: np.ndarray, number: int) -> tuple[float, float]:
    found, first = fit(seconds, np.full((len(seconds), 1), float(number)))
    return float(found[0]), first


def _json(path: Path, may_be_open: bool = False) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if may_be_open and not text.rstrip().endswith("]"):
            text += "]"
        return json.loads(text)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; --from-run takes the --output-dir of a run") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not what a run has written ({error})") from error
