"""Stands for SGLang's server: prints the environment that it was given, and is healthy."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    given = dict(zip(sys.argv, sys.argv[1:], strict=False))
    print(json.dumps(dict(os.environ)), flush=True)
    HTTPServer((given["--host"], int(given["--port"])), Healthy).serve_forever()
