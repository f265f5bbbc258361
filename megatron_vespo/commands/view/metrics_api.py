"""The API of the tab Curves.

GET /api/runs/{id}/curves?name=A&name=B&generation=G&from=I
    the records from index I on, if the file is still that of generation G, else all; "time/*" stands for all
    metrics that begin so:
    {"generation", "from", "records": how many there are in all, "started", "bad_lines",
     "names": of all metrics, "step", "time", "tokens": lists, one value for each record from "from" on,
     "series": {name: {"at": indices of records, "value": [..]}}, "events": all, see MetricsLog.events}
GET /api/runs/{id}/idle
    {"source": "summary.json", "trace.json" or null, "idle": see Trace.idle, "parts": the same over time}
GET /api/metrics
    {name: what it means}, from docs/reference/metrics.md; names contain <placeholders>
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from megatron_vespo.commands.view.explanations import explanations
from megatron_vespo.commands.view.idle_time import IdleTime
from megatron_vespo.commands.view.metrics_log import MetricsLog
from megatron_vespo.commands.view.replies import json_reply, run_of
from megatron_vespo.commands.view.runs import Run, Runs

MAX_NAMES = 400  # in one request


class Logs:
    """The MetricsLog of each run, kept between requests."""

    def __init__(self) -> None:
        self._logs: dict[str, MetricsLog] = {}

    def __getitem__(self, run: Run) -> MetricsLog:
        return self._logs.setdefault(run.id, MetricsLog(run))


def routes(runs: Runs) -> list[web.RouteDef]:
    logs = Logs()
    idle: dict[str, IdleTime] = {}

    async def curves(request: web.Request) -> web.Response:
        run = run_of(runs, request)
        names = request.query.getall("name", [])
        if len(names) > MAX_NAMES:
            raise ValueError(f"{len(names)} metrics in one request; at most {MAX_NAMES}")
        generation, first = _number(request, "generation"), _number(request, "from")
        return json_reply(await asyncio.to_thread(read_curves, logs[run], names, generation, first))

    async def idle_time(request: web.Request) -> web.Response:
        run = run_of(runs, request)
        return json_reply(await asyncio.to_thread(idle.setdefault(run.id, IdleTime(run)).read))

    async def explain(_: web.Request) -> web.Response:
        return json_reply(explanations())

    return [
        web.get("/api/runs/{id}/curves", curves),
        web.get("/api/runs/{id}/idle", idle_time),
        web.get("/api/metrics", explain),
    ]


def read_curves(log: MetricsLog, names: list[str], generation: int, first: int) -> dict[str, Any]:
    """See the top of the module."""
    with log.lock:
        log.refresh()
        if generation != log.generation or not 0 <= first <= len(log):
            first = 0
        series = {}
        for name in _written_out(names, log.columns):
            if name in log.columns:
                at, value = log.columns[name].since(first)
                series[name] = {"at": at, "value": value}
        return {
            "generation": log.generation,
            "from": first,
            "records": len(log),
            "started": log.started(),
            "bad_lines": log.bad_lines,
            "names": sorted(log.columns),
            "step": log.step[first:].tolist(),
            "time": log.time[first:].tolist(),
            "tokens": log.tokens[first:].tolist(),
            "series": series,
            "events": log.events(),
        }


def _written_out(names: Iterable[str], known: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        every = [other for other in known if other.startswith(name[:-1])] if name.endswith("*") else [name]
        found |= dict.fromkeys(every)
    return list(found)


def _number(request: web.Request, name: str) -> int:
    text = request.query.get(name, "0")
    if not text.isdecimal() or len(text) > 15:
        raise ValueError(f"{name}={text!r} is no number")
    return int(text)
