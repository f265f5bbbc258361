"""The viewer's web server: who may ask, the page's files, and the API.

Only this machine's browser may ask. A page of another site could make it ask too, so a request needs the
token (in the address, later in a cookie that other sites' pages do not send), and a Host that is this
machine: a site whose name suddenly resolves to 127.0.0.1 (DNS rebinding) has another.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from megatron_vespo.commands.view import compare_api, metrics_api, responses_api
from megatron_vespo.commands.view.replies import error_reply, json_reply
from megatron_vespo.commands.view.runs import RESPONSES, Run, Runs

PAGE = Path(__file__).parent / "page"
APIS = (metrics_api, responses_api, compare_api)  # modules with `routes(runs) -> list[web.RouteDef]`
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    # uPlot sets styles of its elements by script, which style-src does not concern
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HOSTS = {"127.0.0.1", "localhost", "::1"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(runs: Runs, token: str, host: str = "127.0.0.1") -> web.Application:
    """The server of `runs`. It answers whoever knows `token`, at `host` or another name of loopback."""
    app = web.Application(middlewares=[_guard(token, HOSTS | {host})])
    app.router.add_get("/", _file(PAGE / "index.html"))
    for path in sorted(PAGE.rglob("*")):
        if path.suffix in TYPES:  # a table of all files: no name in a request is ever opened
            app.router.add_get(f"/{path.relative_to(PAGE).as_posix()}", _file(path))

    async def list_runs(_: web.Request) -> web.Response:
        return json_reply(await asyncio.to_thread(lambda: [describe(run) for run in runs.refresh()]))

    app.router.add_get("/api/runs", list_runs)
    for module in APIS:
        app.add_routes(module.routes(runs))
    return app


def describe(run: Run) -> dict:
    """What the page says about a run."""
    return {
        "id": run.id,
        "path": str(run.path),
        "gone": run.gone,
        "finished": run.finished,
        "modified": run.modified,
        "starts": len(run.records()),
        "has_responses": (run.path / RESPONSES).is_dir(),
    }


def cookie_name(token: str) -> str:
    """Cookies know no ports: viewers on two ports need two names."""
    return f"megatron-vespo-view-{hashlib.sha256(token.encode()).hexdigest()[:12]}"


def _guard(token: str, hosts: set[str]):
    name = cookie_name(token)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        reply = _refusal(request, hosts, token, name)
        if reply is None:
            reply = await _answered(request, handler)
            if request.path == "/" and "token" in request.query:
                # no redirect: after a click on another site's page it would come without the cookie
                reply.set_cookie(name, token, httponly=True, samesite="Strict", path="/")
        reply.headers.update(HEADERS)
        return reply

    return guard


def _refusal(request: web.Request, hosts: set[str], token: str, cookie: str) -> web.Response | None:
    try:
        asked = urlsplit(f"//{request.headers.get('Host', '')}").hostname
    except ValueError:
        asked = None
    if asked not in hosts:
        return error_reply(403, "this server answers as 127.0.0.1 or localhost only")
    given = request.query.get("token") or request.cookies.get(cookie) or ""
    if not hmac.compare_digest(given.encode(errors="replace"), token.encode()):
        return error_reply(403, "open the address that megatron-vespo view printed: it contains the token")
    if request.method not in ("GET", "HEAD"):
        return error_reply(405, "this server only shows: GET")
    return None


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler's reply; errors as one line of JSON."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return error_reply(error.status, error.text or error.reason)
    except ValueError as error:
        return error_reply(400, str(error))
    except OSError as error:
        status = 404 if isinstance(error, FileNotFoundError) else 503
        return error_reply(status, f"{error.filename}: {error.strerror}")
    except sqlite3.Error as error:  # somebody has deleted the index, for example; it is built again
        return error_reply(503, f"the index is not ready, ask again: {error}")
    except Exception as error:  # the server goes on, and the page says what it was
        return error_reply(500, f"internal error: {type(error).__name__}: {error}")


def _file(path: Path) -> Handler:
    async def send(_: web.Request) -> web.Response:
        return web.Response(body=path.read_bytes(), content_type=TYPES[path.suffix], charset="utf-8")

    return send
