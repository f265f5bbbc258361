"""A stub of SandboxFusion's POST /run_code: it runs the code without a sandbox. For trusted programs only."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class SandboxFusionStub:
    """`requests` are the payloads so far. `faults` are answered first, one each: a status, or a reply."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.faults: list[int | dict[str, Any]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._reply(*stub.answer(self.path, json.loads(body)))

            def _reply(self, status: int, reply: dict[str, Any]) -> None:
                text = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path: str, payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path != "/run_code":
            return 404, {"detail": "Not Found"}
        self.requests.append(payload)
        if self.faults:
            fault = self.faults.pop(0)
            return (fault, {"detail": "fault"}) if isinstance(fault, int) else (200, fault)
        return 200, run_code(payload)


def run_code(payload: dict[str, Any]) -> dict[str, Any]:
    """The reply's fields as the public API documents them."""
    reply = {"message": "", "compile_result": None, "executor_pod_name": None, "files": {}}
    command = [sys.executable, "-c", payload["code"]]
    try:
        done = subprocess.run(
            command, input=payload["stdin"], capture_output=True, text=True, timeout=payload["run_timeout"]
        )
    except subprocess.TimeoutExpired:
        result = {"status": "TimeLimitExceeded", "execution_time": None, "return_code": None}
        return {**reply, "status": "Failed", "run_result": {**result, "stdout": None, "stderr": None}}
    result = {"status": "Finished", "execution_time": 0.1, "return_code": done.returncode}
    status = "Failed" if done.returncode else "Success"
    return {**reply, "status": status, "run_result": {**result, "stdout": done.stdout, "stderr": done.stderr}}


@contextlib.contextmanager
def sandbox_fusion_stub() -> Iterator[SandboxFusionStub]:
    stub = SandboxFusionStub()
    thread = threading.Thread(target=stub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()
