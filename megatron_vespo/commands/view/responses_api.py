"""The API of the tabs Responses and Distributions; every path below /api/runs/{id}/.

responses?step_min&step_max&reward_min&reward_max&sign&length_min&length_max&staleness_min&staleness_max
         &log_w_min&log_w_max&finish&status&source&group&text&sort&page      a page of the table
responses/{step}/{index}      one response token by token
groups/{step}/{group}         all responses to a prompt in an optimizer step
distributions?step_min&step_max
what_if?step_min&step_max&c1_positive&c2_positive&c1_negative&c2_negative&mini_batches
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_vespo.commands.view import query
from megatron_vespo.commands.view.distributions import Responses, distributions, what_if
from megatron_vespo.commands.view.index import RunIndex
from megatron_vespo.commands.view.kernel import Kernel
from megatron_vespo.commands.view.replies import json_reply, run_of
from megatron_vespo.commands.view.response_detail import response_detail
from megatron_vespo.commands.view.runs import Run, Runs
from megatron_vespo.data.step_records import read_step

DEFAULT_SORT = "-step"
LARGEST_CONSTANT = 100.0  # c1 and c2
LARGEST = 2**40  # of integers in a request: no run has as many steps

Answer = Callable[[RunIndex, web.Request], dict[str, Any]]


class Indexes:
    """The indexes of the runs that somebody has looked at. May be used by several threads."""

    def __init__(self, cache: Path | None = None):
        self._cache, self._lock = cache, threading.Lock()
        self._indexes: dict[Path, RunIndex] = {}

    def __getitem__(self, run: Run) -> RunIndex:
        """Return the run's index, which follows the run from now on."""
        with self._lock:
            if run.path not in self._indexes:
                self._indexes[run.path] = RunIndex(run.path, self._cache)
                self._indexes[run.path].start()
            return self._indexes[run.path]


def routes(runs: Runs) -> list[web.RouteDef]:
    indexes = Indexes()

    def handler(answer: Answer) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.Response:
            run = run_of(runs, request)
            return json_reply(await asyncio.to_thread(lambda: answer(indexes[run], request)))

        return handle

    answers = {
        "responses": _table,
        "responses/{step}/{index}": _response,
        "groups/{step}/{group}": _group,
        "distributions": _distributions,
        "what_if": _what_if,
    }
    return [web.get(f"/api/runs/{{id}}/{path}", handler(answer)) for path, answer in answers.items()]


def _table(index: RunIndex, request: web.Request) -> dict[str, Any]:
    filters = query.Filters.of(request.query)
    sort, number = request.query.get("sort") or DEFAULT_SORT, _integer(request.query, "page", 0)
    query.order(sort)
    with index.reading() as connection:
        found = query.facets(connection, filters)
        rows = query.page(connection, filters, sort, number)
    page = {"total": found.pop("total"), "rows": rows, "facets": found, "page": number}
    return page | {"page_size": query.PAGE_SIZE, "index": index.state()}


def _response(index: RunIndex, request: web.Request) -> dict[str, Any]:
    step, number = _integer(request.match_info, "step"), _integer(request.match_info, "index")
    path = index.record_file(step)
    if path is None:
        raise web.HTTPNotFound(text=f"step {step} has no recorded responses")
    try:
        return response_detail(read_step(path), number)
    except IndexError as error:
        raise web.HTTPNotFound(text=str(error)) from None


def _group(index: RunIndex, request: web.Request) -> dict[str, Any]:
    step, group = _integer(request.match_info, "step"), _integer(request.match_info, "group", low=-LARGEST)
    with index.reading() as connection:
        rows = query.group_rows(connection, step, group)
    path = index.record_file(step)
    if not rows or path is None:
        raise web.HTTPNotFound(text=f"step {step} has no recorded responses of group {group}")
    record = read_step(path)
    prompt = record.completions[rows[0]["index"]].prompt
    text = {"text": prompt.text, "answer": prompt.answer, "tokens": record.text(prompt.token_ids)}
    return {"step": step, "group": group, "prompt": text, "rows": rows}


def _distributions(index: RunIndex, request: web.Request) -> dict[str, Any]:
    return distributions(_responses(index, request)) | {"index": index.state(), "range": _range(index)}


def _what_if(index: RunIndex, request: web.Request) -> dict[str, Any]:
    responses = _responses(index, request)
    recorded = Kernel.of(responses.settings)
    kernel = Kernel(
        *(
            (
                _constant(request.query, f"c1_{sign}", c1),
                _constant(request.query, f"c2_{sign}", c2),
            )
            for sign, (c1, c2) in (("positive", recorded.positive), ("negative", recorded.negative))
        ),
        loss=recorded.loss,
    )
    number = _integer(request.query, "mini_batches", 0)
    return what_if(responses, kernel, number or None)


def _responses(index: RunIndex, request: web.Request) -> Responses:
    low = _integer(request.query, "step_min", 0)
    high = _integer(request.query, "step_max", LARGEST)
    with index.reading() as connection:
        return Responses.of(connection, low, high)


def _range(index: RunIndex) -> list[int | None]:
    """Return the first and the last step that is indexed."""
    with index.reading() as connection:
        return list(connection.execute("SELECT min(step), max(step) FROM responses").fetchone())


def _integer(values: Mapping[str, str], name: str, default: int | None = None, low: int = 0) -> int:
    """ValueError if it is none, or out of range; a value without a default is required."""
    text = values.get(name) or ("" if default is None else str(default))
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not low <= number <= LARGEST:
        raise ValueError(f"{name} is {text!r}; it must be an integer from {low} on")
    return number


def _constant(values: Mapping[str, str], name: str, default: float) -> float:
    text = values.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= LARGEST_CONSTANT:
        raise ValueError(f"{name} is {text!r}; it must be a number from 0 to {LARGEST_CONSTANT:g}")
    return value
