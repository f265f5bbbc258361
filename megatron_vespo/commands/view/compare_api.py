"""The API of the tab Compare.

GET /api/compare?a=ID&b=ID&last=K
    {"last": K, "common": number of optimizer steps after which both runs have the record of a batch,
     "steps": [first, last] of those compared, or [],
     "metrics": [{"name", "a", "b": means, "difference": b - a, "low", "high", "number", "effective"}],
     "accuracy": {"a" and "b": [{"step", "value", "low", "high"}]}, every evaluation,
     "flags", "versions", "machine": [{"name", "a", "b", "given": whether a user changed the default}]}
    Differences are those of the last K common steps, see intervals.mean_interval. Flags, versions and machine
    are those that differ, from the newest run-00N.json of each run; null where a run has none.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from megatron_vespo.commands.view.intervals import mean_interval
from megatron_vespo.commands.view.metrics_api import Logs
from megatron_vespo.commands.view.metrics_log import MetricsLog, start_records
from megatron_vespo.commands.view.replies import json_reply, run_of
from megatron_vespo.commands.view.runs import Run, Runs

BATCH = "policy/version"
ACCURACY = ("eval/accuracy", "eval/interval_low", "eval/interval_high")
LAST, MOST = 20, 100_000
LARGEST = 1e100  # of values that are compared: squares of larger ones overflow; NaN is none, too
MISSING = object()


def routes(runs: Runs) -> list[web.RouteDef]:
    logs = Logs()

    async def compare(request: web.Request) -> web.Response:
        chosen = [run_of(runs, request, request.query.get(side, "")) for side in ("a", "b")]
        text = request.query.get("last", str(LAST))
        if not text.isdecimal() or not 1 <= int(text[:9]) <= MOST:
            raise ValueError(f"last={text!r} is no number of batches from 1 to {MOST}")
        return json_reply(
            await asyncio.to_thread(compare_runs, chosen, [logs[run] for run in chosen], int(text))
        )

    return [web.get("/api/compare", compare)]


def compare_runs(runs: list[Run], logs: list[MetricsLog], last: int) -> dict[str, Any]:
    """See the top of the module; `runs` and `logs` are those of a and b."""
    places = []
    for log in logs:
        with log.lock:
            log.refresh()
            places.append(places_of_steps(log))
    steps = sorted(places[0].keys() & places[1].keys())
    used = steps[-last:]
    values, accuracy = [], {}
    for side, log, place in zip("ab", logs, places, strict=True):
        with log.lock:
            values.append(metrics_at(log, [place[step] for step in used]))
            accuracy[side] = evaluations(log)
    return {
        "last": last,
        "common": len(steps),
        "steps": [used[0], used[-1]] if used else [],
        "metrics": differences(*values),
        "accuracy": accuracy,
        **differing_records(newest_record(runs[0]), newest_record(runs[1])),
    }


def places_of_steps(log: MetricsLog) -> dict[int, int]:
    """Optimizer step -> index of the record of the batch that ended there."""
    batches = log.columns[BATCH].at if BATCH in log.columns else []
    return {log.step[index]: index for index in batches}


def metrics_at(log: MetricsLog, indices: list[int]) -> list[dict[str, float]]:
    """Metrics of these records; `indices` are increasing."""
    found: dict[int, dict[str, float]] = {index: {} for index in indices}
    for name, column in log.columns.items() if indices else ():
        for index, value in zip(*column.since(indices[0]), strict=True):
            if index in found:
                found[index][name] = value
    return list(found.values())


def evaluations(log: MetricsLog) -> list[dict[str, float | None]]:
    columns = [dict(log.columns.get(name, ())) for name in ACCURACY]
    return [
        {"step": log.step[index], "value": value, "low": columns[1].get(index), "high": columns[2].get(index)}
        for index, value in columns[0].items()
    ]


def differences(a: list[dict[str, float]], b: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Of every metric that both runs have; `a` and `b` are the metrics of the same steps.

    A step counts where both values are below LARGEST. Differences within a step are free of the trend that
    both runs share.
    """
    names = sorted({name for metrics in a for name in metrics} & {name for metrics in b for name in metrics})
    rows = []
    for name in names:
        pairs = [(x.get(name, math.nan), y.get(name, math.nan)) for x, y in zip(a, b, strict=True)]
        pairs = [(x, y) for x, y in pairs if abs(x) < LARGEST and abs(y) < LARGEST]
        if name == BATCH or not pairs:
            continue
        found = mean_interval([y - x for x, y in pairs])
        means = {
            side: math.fsum(pair[place] for pair in pairs) / len(pairs) for place, side in enumerate("ab")
        }
        interval = {"difference": found.mean, "low": found.low, "high": found.high}
        rows.append({"name": name, **means, **interval, "number": found.number, "effective": found.effective})
    return rows


def newest_record(run: Run) -> dict[str, Any] | None:
    newest = None
    for _, content in start_records(run):
        newest = content
    return newest


def differing_records(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any]:
    """What differs between two run records, by kind; see driver/run_record.py for their content."""
    if a is None or b is None:
        return {"flags": None, "versions": None, "machine": None}
    given = {*_mapping(a, "changed"), *_mapping(b, "changed")}
    versions = [{**_mapping(one, "packages"), "patches": one.get("patches")} for one in (a, b)]
    for found, one in zip(versions, (a, b), strict=True):
        found["source commit"] = _mapping(one, "source").get("commit")
    machine = [
        _flat(
            {"machine": one.get("machine"), "environment": one.get("environment"), "nodes": one.get("nodes")}
        )
        for one in (a, b)
    ]
    flags = differing(_mapping(a, "arguments"), _mapping(b, "arguments"), given)
    return {
        "flags": sorted(flags, key=lambda row: not row["given"]),
        "versions": differing(versions[0], versions[1]),
        "machine": differing(machine[0], machine[1]),
    }


def differing(
    a: Mapping[str, Any], b: Mapping[str, Any], given: set[str] | None = None
) -> list[dict[str, Any]]:
    """Entries that differ, or that only one has (the other is null)."""
    names = sorted(name for name in {*a, *b} if a.get(name, MISSING) != b.get(name, MISSING))
    return [
        {"name": name, "a": a.get(name), "b": b.get(name), "given": name in (given or ())} for name in names
    ]


def _mapping(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names like "machine host"."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name} {key}".strip())
    return found
