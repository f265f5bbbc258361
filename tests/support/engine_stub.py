"""An engine that answers by rule, on HTTP: for what is about requests and their bookkeeping."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[dict], tuple[list[int], str]]  # a request's body -> token ids, finish reason


class _Server(ThreadingHTTPServer):
    def handle_error(self, *where: object) -> None:
        """Who asked has gone, or the answer was made to fail."""


class EngineStub:
    """Serves on `url` between `with` and its end; `requests` are the bodies that came."""

    def __init__(self, answer: Answer, *, api_key: str | None = None, version: str = "0"):
        self.answer, self.api_key, self.version = answer, api_key, version
        self.requests: list[dict] = []
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> EngineStub:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, body: dict) -> dict:
        token_ids, finish = self.answer(body)
        return {
            "output_ids": token_ids,
            "meta_info": {
                "id": "r",
                "finish_reason": {"type": finish},
                "output_token_logprobs": [[-0.5, token, None] for token in token_ids],
                "weight_versions": [{"version": self.version, "start": 0, "end": len(token_ids)}],
                "num_retractions": 0,
            },
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send({"model_path": "tiny", "weight_version": stub.version})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(body)
                self._send(stub.reply(body))

            def _send(self, answer: dict) -> None:
                allowed = stub.api_key is None or self.headers["Authorization"] == f"Bearer {stub.api_key}"
                content = json.dumps(answer if allowed else {"error": "unauthorized"}).encode()
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
