"""An SGLang server that answers by rule, on HTTP: for what is about requests and their bookkeeping."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

Answer = Callable[[dict], tuple[list[int], str]]  # a request's body -> token ids, finish reason


class EngineStub:
    """Serves on `url` between `with` and its end; `requests` are the bodies that came to /generate.

    `answer` runs in a thread of its own and may wait. If it raises, the connection breaks. A subclass
    overrides `reply` to write the whole reply, or `respond` to answer every POST by a coroutine, which is
    cancelled when the client leaves.
    """

    def __init__(
        self, answer: Answer = lambda body: ([7], "stop"), *, api_key: str | None = None, version: str = "0"
    ):
        self.answer, self.api_key, self.version = answer, api_key, version
        self.requests: list[dict] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready, self._done = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> EngineStub:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def reply(self, body: dict) -> dict:
        return sglang_reply(*self.answer(body), self.version)

    def info(self) -> dict[str, str]:
        return {"model_path": "tiny", "weight_version": str(self.version)}

    async def respond(self, path: str, body: dict) -> dict[str, Any]:
        return await asyncio.to_thread(self.reply, body) if path == "/generate" else self.info()

    async def _handle(self, request: web.Request) -> web.Response:
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "unauthorized"}, status=401)
        if request.method == "GET":
            return web.json_response(self.info())
        body = await request.json()
        if request.path == "/generate":
            self.requests.append(body)
        try:
            return web.json_response(await self.respond(request.path, body))
        except web.HTTPException:
            raise
        except Exception:
            request.transport.abort()
            raise

    async def _serve(self) -> None:
        application = web.Application(client_max_size=2**26)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._done.wait()
        await runner.cleanup()


def sglang_reply(token_ids: list[int], finish: str, version: int | str = 0) -> dict:
    """What /generate answers, in SGLang's words; the log-prob of token t is -t / 10."""
    return {
        "output_ids": token_ids,
        "meta_info": {
            "id": "r",
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-token / 10, token, None] for token in token_ids],
            "weight_versions": [{"version": str(version), "start": 0, "end": len(token_ids)}],
            "num_retractions": 0,
        },
    }
