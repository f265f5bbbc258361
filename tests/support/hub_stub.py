"""As much of the Hugging Face hub as a download of one data set asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34


class HubStub:
    """Serves `files` (path -> content) of data set `repo` on `url`; `asked` are the paths of requests."""

    def __init__(self, repo: str, files: dict[str, bytes]):
        self.repo, self.files, self.asked = repo, files, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStub:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        api, resolve = f"/api/datasets/{self.repo}/", f"/datasets/{self.repo}/resolve/{COMMIT}/"
        if path.startswith(f"{api}revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            return _json({"id": self.repo, "sha": COMMIT, "siblings": siblings})
        if path.startswith(f"{api}tree/"):
            return _json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _tag(content)}
                    for name, content in self.files.items()
                ]
            )
        content = self.files.get(path.removeprefix(resolve))
        if content is None:
            return 404, b"", {}
        return 200, content, {"ETag": f'"{_tag(content)}"', "X-Repo-Commit": COMMIT}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET(body=False)

            def do_GET(self, body: bool = True) -> None:
                path = urlsplit(self.path).path
                stub.asked.append(path)
                status, content, headers = stub.answer(path)
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
