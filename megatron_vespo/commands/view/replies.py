"""JSON replies of the viewer's API."""

from __future__ import annotations

import json
import math
from typing import Any

from aiohttp import web

from megatron_vespo.commands.view.runs import Run, Runs


def json_reply(value: Any, status: int = 200) -> web.Response:
    """`value` as JSON at full float precision; NaN becomes null, infinities "Infinity" and "-Infinity"."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return web.Response(text=text, status=status, content_type="application/json")


def error_reply(status: int, line: str) -> web.Response:
    return json_reply({"error": " ".join(line.split())}, status)


def run_of(runs: Runs, request: web.Request, id_: str | None = None) -> Run:
    """The run `id_`, or that of /api/runs/{id}/...; 404 if there is none, 410 if its folder has gone."""
    id_ = request.match_info["id"] if id_ is None else id_
    try:
        run = runs[id_]
    except KeyError:
        raise web.HTTPNotFound(text=f"there is no run {id_}") from None
    if run.gone:
        raise web.HTTPGone(text=f"the folder of {id_} has gone: {run.path}")
    return run


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else json.dumps(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
