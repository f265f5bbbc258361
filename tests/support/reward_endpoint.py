"""A small HTTP server that rewards responses: the first word of a response says how it answers."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections come all at once
    daemon_threads = True


class RewardEndpoint:
    """Counts what it is asked. `answer` documents the commands."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.tries: Counter[str] = Counter()  # by response
        self.connections = self.in_work = self.most_in_work = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept

            def setup(self) -> None:
                super().setup()
                endpoint.connections += 1

            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.counted(payload) as tries:
                    status, body = endpoint.answer(payload, tries)
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"

    @contextlib.contextmanager
    def counted(self, payload: dict[str, Any]) -> Iterator[int]:
        """Count a request; yields its number among those of the same response."""
        with self._lock:
            self.requests.append(payload)
            self.tries[payload["response"]] += 1
            self.in_work += 1
            self.most_in_work = max(self.most_in_work, self.in_work)
            tries = self.tries[payload["response"]]
        try:
            yield tries
        finally:
            with self._lock:
                self.in_work -= 1

    def answer(self, payload: dict[str, Any], tries: int) -> tuple[int, bytes]:
        """Status and body; status 0 closes the connection without an answer."""
        command, _, argument = payload["response"].partition(" ")
        good = json.dumps({"reward": float(payload["answer"]), "form": 0.5}).encode()
        if command == "status":
            return int(argument), b'{"error": "as  you\n wished"}'
        if command == "flaky":  # these statuses, one after the other, then a reward
            statuses = argument.split()
            return (int(statuses[tries - 1]), b"later") if tries <= len(statuses) else (200, good)
        if command == "wait":
            time.sleep(float(argument))
        if command == "say":
            return 200, argument.encode()
        return 200, good


@contextlib.contextmanager
def reward_endpoint() -> Iterator[RewardEndpoint]:
    endpoint = RewardEndpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join()
