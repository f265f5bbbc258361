"""Engines with a key: who has it is served, nobody else, and nothing that others can read has it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from megatron_vespo.rollout.api_key import REPLACEMENT
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.sglang_server import group_members
from megatron_vespo.system.http import EngineRequestError, get_json, post_json
from megatron_vespo.types import SamplingParams
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from megatron_vespo.weight_sync.verify import weight_sums
from tests.support.runs import Run, nothing_left, train_command, write_questions
from tests.support.servers import HOST, ROUTES, tiny_engine

KEY = "-the-key-of-this-test"  # one key in 64 begins so
# the program's key cannot be guessed: for the test, every process draws this one
SITE = f"import secrets\nsecrets.token_urlsafe = lambda num_bytes=None: {KEY!r}\n"
RAY_SESSION = Path("/tmp/ray/session_latest")


def processes_that_show_it(pids) -> list[tuple[int, str]]:
    """By their command lines, which everybody on the machine can read, or their environments."""
    found = []
    for pid in pids:
        for name in ("cmdline", "environ"):
            try:
                content = Path(f"/proc/{pid}/{name}").read_bytes()
            except OSError:
                continue  # it has ended
            if KEY.encode() in content:
                found.append((pid, name))
    return found


def test_a_server_with_a_key(tiny_model, tmp_path, prompts):
    log = tmp_path / "engine.log"
    with tiny_engine(tiny_model, log, "--log-level", "info", api_key=KEY) as engine:
        sampling = SamplingParams(temperature=1.0, max_new_tokens=4, stop_token_ids=())
        collector = Collector([engine.url], routes=ROUTES, request_timeout_s=60.0, api_key=KEY)
        assert len(collector.collect(prompts[:1], sampling, num_completions=2, seed=0)[0]) == 2
        [sums] = weight_sums(EngineAdmin([engine.url], 60.0, None, KEY))
        assert len(sums) > 5
        for key in (None, "another"):
            calls = ("/generate", {"input_ids": [5]}), ("/weights_checker", {"action": "reset_tensors"})
            for path, payload in calls:
                with pytest.raises(EngineRequestError, match="answered 401"):
                    post_json(engine.url, path, payload, 30, key)
            with pytest.raises(EngineRequestError, match="answered 401"):
                get_json(engine.url, "/server_info", 30, key)
        assert [sums] == weight_sums(EngineAdmin([engine.url], 60.0, None, KEY))
        assert len(group_members(engine.pid)) > 1 and not processes_that_show_it(group_members(engine.pid))
    assert KEY not in log.read_text()
    assert f"'api_key': '{REPLACEMENT}'" in log.read_text()  # SGLang did write its arguments


def files_with_the_key(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_shows_it_nowhere(tiny_model, tmp_path, monkeypatch):
    site, output, data = tmp_path / "site", tmp_path / "run", tmp_path / "questions.jsonl"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    write_questions(data)
    command = train_command(
        tiny_model, data, output, "--engine-api-key", "always", "--sglang-log-level", "info",
        "--sglang-max-total-tokens", "16384", "--save", str(output / "checkpoints"), "--save-interval", "2",
    )  # fmt: skip
    shown, refused, deadline = [], False, time.monotonic() + 800
    with Run(command, tmp_path / "run.log") as run:
        while run.process.poll() is None and time.monotonic() < deadline:
            shown += processes_that_show_it(psutil.pids())
            refused = refused or refuses_strangers(run)
            time.sleep(0.5)
        assert run.wait(1) == 0, run.output
        assert refused
        assert shown == []
        assert REPLACEMENT in (output / "logs/engine-0.log").read_text()  # the key was in use
        assert files_with_the_key(output) == []
        assert files_with_the_key(RAY_SESSION.resolve()) == []
        assert KEY not in run.output
        assert list(output.glob("checkpoints/iter_*")) and (output / "summary.json").exists()
        assert nothing_left(run)


def refuses_strangers(run: Run) -> bool:
    """The run's engine, if it listens already."""
    for process in run.survivors():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "megatron_vespo.rollout.server_process" in command:
            url = f"http://{HOST}:{command[command.index('--port') + 1]}"
            try:
                post_json(url, "/generate", {"input_ids": [5]}, 30)
            except EngineRequestError as error:
                return error.status == 401
            raise AssertionError("it serves strangers")
    return False
