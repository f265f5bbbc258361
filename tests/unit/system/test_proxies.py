"""Calls to engines go to the engines, whatever proxies the environment names: a proxy would see their key."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.system.http import EngineRequestError, get_json, post_json
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from tests.support.builders import SAMPLING, make_prompt
from tests.support.engine_stub import EngineStub

KEY = "the-key"


@pytest.fixture
def proxy(monkeypatch):
    """What a proxy has seen that every variable names; no address is exempt."""
    seen: list[tuple[str, str | None]] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(503)
            self.end_headers()

        do_POST = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield seen
    server.shutdown()
    server.server_close()


@pytest.fixture
def engine():
    with EngineStub(lambda body: ([5, 6], "length"), api_key=KEY) as stub:
        yield stub


def test_control_calls(proxy, engine):
    assert get_json(engine.url, "/model_info", 5.0, KEY)["weight_version"] == "0"
    assert post_json(engine.url, "/generate", {}, 5.0, KEY)["output_ids"] == [5, 6]
    with pytest.raises(EngineRequestError, match="did not answer"):
        get_json("http://127.0.0.1:9", "/health", 1.0, KEY)
    assert not proxy


def test_a_netrc_file_does_not_replace_the_key(engine, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert post_json(engine.url, "/generate", {}, 5.0, KEY)["output_ids"] == [5, 6]


def test_completions(proxy, engine):
    collector = Collector([engine.url], request_timeout_s=5.0, api_key=KEY)
    [[completion]] = collector.collect([make_prompt()], SAMPLING, num_completions=1, seed=0)
    assert completion.token_ids.tolist() == [5, 6] and not proxy


def test_weight_syncs(proxy, engine):
    admin = EngineAdmin([engine.url], 5.0, None, KEY)
    assert admin.call("/generate", {})[0]["output_ids"] == [5, 6]
    admin.close()
    assert not proxy
