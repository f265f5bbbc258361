"""The viewer's server: the token, the cookie, the Host, and that it sends nothing but its own files."""

import asyncio
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import CookieJar
from aiohttp.test_utils import TestClient, TestServer

from megatron_vespo.commands.main import run
from megatron_vespo.commands.view import responses_api
from megatron_vespo.commands.view.replies import json_reply
from megatron_vespo.commands.view.runs import Runs
from megatron_vespo.commands.view.server import PAGE, TYPES, cookie_name, make_app

TOKEN = "a-token-of-this-test"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "work" / "run"
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "policy/version": 1.0}\n')
    (tmp_path / "secret.txt").write_text("secret")
    return path


@asynccontextmanager
async def client(folder: Path):
    app = make_app(Runs([folder]), TOKEN)
    async with TestClient(TestServer(app), cookie_jar=CookieJar(unsafe=True)) as found:
        yield found


def ask(folder: Path, path: str, method: str = "GET", **options) -> tuple[int, str, dict]:
    """(status, text, headers) of one request without any cookie."""

    async def one():
        async with client(folder) as asked, asked.request(method, path, **options) as reply:
            return reply.status, await reply.text(), reply.headers

    return asyncio.run(one())


def test_without_the_token_nothing_is_answered(folder):
    for path in ("/", "/app.js", "/api/runs", "/nothing", "/?token=", "/?token=wrong", "/?token=%ff"):
        status, text, _ = ask(folder, path)
        assert status == 403 and "token" in json.loads(text)["error"], path
        assert TOKEN not in text


def test_a_cookie_that_is_no_text_is_refused(folder):
    async def raw() -> bytes:
        async with client(folder) as asked:
            reader, writer = await asyncio.open_connection("127.0.0.1", asked.port)
            head = f"GET / HTTP/1.0\r\nHost: localhost\r\nCookie: {cookie_name(TOKEN)}=".encode()
            writer.write(head + b"\xff\xe9\r\n\r\n")
            reply = await reader.read()
            writer.close()
            return reply

    assert b" 403 " in asyncio.run(raw()).splitlines()[0]


def test_the_address_with_the_token_sets_a_cookie_that_suffices(folder):
    async def visit():
        async with client(folder) as asked:
            async with asked.get("/", params={"token": TOKEN}) as reply:
                assert reply.status == 200 and "<title>" in await reply.text()
                cookie = reply.cookies[cookie_name(TOKEN)]
                assert cookie["samesite"] == "Strict" and cookie["httponly"] and not cookie["max-age"]
            for path in ("/", "/app.js", "/api/runs"):
                async with asked.get(path) as reply:
                    assert reply.status == 200 and "Set-Cookie" not in reply.headers

    asyncio.run(visit())


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.1.1.1"]
)
def test_another_host_is_refused(folder, host):
    status, text, _ = ask(folder, f"/api/runs?token={TOKEN}", headers={"Host": host})
    assert status == 403 and "127.0.0.1" in text


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1:9999", "[::1]:80"])  # also through ssh -L
def test_names_of_this_machine_are_taken(folder, host):
    assert ask(folder, f"/api/runs?token={TOKEN}", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_get(folder, method):
    assert ask(folder, f"/api/runs?token={TOKEN}", method)[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/../../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "/server.py", "/vendor",
        "/vendor/../../server.py", "/vendor/%2e%2e/%2e%2e/server.py", "//etc/passwd", "/vendor/..",
        "/api/runs/..", "/api/runs/..%2f..%2fsecret.txt/metrics", "/api/runs/%00/metrics",
    ],
)  # fmt: skip
def test_no_other_file_is_sent(folder, path):
    """A socket, because clients tidy paths up."""

    async def raw() -> bytes:
        async with client(folder) as asked:
            reader, writer = await asyncio.open_connection(asked.host, asked.port)
            sep = "&" if "?" in path else "?"
            head = f"GET {path}{sep}token={TOKEN} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            reply = await reader.read()
            writer.close()
            return reply

    reply = asyncio.run(raw())
    assert reply.split()[1] in (b"404", b"400"), reply[:200]
    assert b"secret\n" not in reply and b"root:" not in reply and b"def " not in reply


def test_every_reply_forbids_scripts_of_others(folder):
    for path in (f"/?token={TOKEN}", f"/api/runs?token={TOKEN}", f"/nothing?token={TOKEN}", "/"):
        headers = ask(folder, path)[2]
        policy = dict(part.split(None, 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"


def test_every_file_of_the_page_is_sent_and_packaged(folder):
    files = [path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.is_file()]
    assert {"index.html", "app.js", "style.css", "vendor/uPlot.esm.js", "vendor/uPlot.LICENSE"} <= set(files)
    assert all(name.count("/") == 0 or re.fullmatch(r"vendor/[^/]+", name) for name in files)  # see setup.py
    for name in files:
        if Path(name).suffix in TYPES:
            status, _, headers = ask(folder, f"/{name}?token={TOKEN}")
            assert status == 200 and headers["Content-Type"].startswith(TYPES[Path(name).suffix])


def test_the_page_names_no_other_host():
    for path in PAGE.rglob("*"):
        if path.is_file() and "vendor" not in path.parts:
            assert not re.search(r"https?://|src=\"//|url\(", path.read_text()), path


def test_a_run_that_vanished_is_said(folder):
    async def visit():
        async with client(folder) as asked:
            folder.rename(folder.with_name("moved"))
            async with asked.get("/api/runs", params={"token": TOKEN}) as reply:
                [described] = await reply.json()
                assert described["gone"] and described["id"] == "run"

    asyncio.run(visit())


def test_a_file_that_cannot_be_read_is_said(folder):
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    (folder / "run-001.json").write_text("{}")
    status, text, _ = ask(folder, "/api/runs/run/curves", params={"token": TOKEN})
    assert (status, json.loads(text)["error"]) == (503, f"{folder}/metrics.jsonl: Is a directory")


def test_an_index_that_is_not_ready_is_no_fault_of_the_server(folder, monkeypatch):
    def missing(*_):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(responses_api, "RunIndex", missing)
    status, text, _ = ask(folder, "/api/runs/run/responses", params={"token": TOKEN})
    assert status == 503 and json.loads(text)["error"].startswith("the index is not ready, ask again: ")


def test_numbers_that_json_does_not_know():
    text = json_reply({"a": [float("nan"), float("inf"), -float("inf"), 0.1], "b": (1, "x")}).text
    assert json.loads(text) == {"a": [None, "Infinity", "-Infinity", 0.1], "b": [1, "x"]}


class TestRunFolders:
    def test_a_folder_of_runs_and_names_that_are_there_twice(self, tmp_path):
        for name in ("a/run", "b/run", "c", "c/run", ".hidden/run"):
            (tmp_path / name).mkdir(parents=True)
        for name in ("a/run", "b/run", "c", ".hidden/run"):
            (tmp_path / name / "run-001.json").write_text("{}")
        found = {run.id: run.path.relative_to(tmp_path).as_posix() for run in Runs([tmp_path]).refresh()}
        assert found == {"c": "c", "run": "a/run", "b-run": "b/run"}

    def test_a_run_that_begins_later_is_found_and_others_keep_their_names(self, tmp_path):
        (tmp_path / "z").mkdir()
        (tmp_path / "z/metrics.jsonl").touch()
        runs = Runs([tmp_path])
        (tmp_path / "a/z").mkdir(parents=True)
        (tmp_path / "a/z/metrics.jsonl").touch()
        assert [run.id for run in runs.refresh()] == ["z", "a-z"]

    def test_a_name_is_fit_for_addresses(self, tmp_path):
        folder = tmp_path / 'läuft <b> "x" % / & ?'
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
        [found] = Runs([folder]).refresh()
        assert re.fullmatch(r"[\w.-]+", found.id, re.ASCII)


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "said"), [("nothing", "no such folder"), ("file", "is a file"), ("empty", "no run folder")]
    )
    def test_no_run(self, tmp_path, capsys, name, said):
        (tmp_path / "file").touch()
        (tmp_path / "empty/x").mkdir(parents=True)
        assert run(["view", str(tmp_path / name)]) == 2
        line = capsys.readouterr().err
        assert said in line and name in line and line.count("\n") == 1

    def test_a_port_that_is_taken(self, folder, capsys):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert run(["view", str(folder), "--port", port]) == 2
        line = capsys.readouterr().err
        assert f"--port {port}" in line and "--port 0" in line and line.count("\n") == 1

    @pytest.mark.parametrize("words", [["--host", "0.0.0.0"], ["--host", "example.org"], ["--port", "65536"]])
    def test_flags(self, folder, capsys, words):
        with pytest.raises(SystemExit) as stop:
            run(["view", str(folder), *words])
        assert stop.value.code == 2 and words[1] in capsys.readouterr().err


def test_it_loads_no_framework():
    program = (
        "import sys, megatron_vespo.commands.view.command\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'ray', 'sglang', 'megatron', 'transformers', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stderr + done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_also_with_an_open_connection(folder, number):
    command = [sys.executable, "-m", "megatron_vespo", "view", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=[\w-]{20,}", process.stdout.readline())
        with socket.create_connection(("127.0.0.1", int(url[1])), timeout=10) as connection:
            connection.sendall(b"GET /api/runs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 403")
            process.send_signal(number)
            _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and said == "megatron-vespo: interrupted\n"
