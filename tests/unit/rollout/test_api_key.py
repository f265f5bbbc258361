"""The engines' key: when there is one, how it travels, and that it stays out of sight."""

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.rollout import sglang_server as engine_module
from megatron_vespo.rollout.api_key import (
    REPLACEMENT,
    check_flags_with_key,
    hand_over,
    keep_out_of_logs,
    new_api_key,
    receive,
)
from megatron_vespo.rollout.server_arguments import parse_sglang_flags
from megatron_vespo.rollout.sglang_server import SGLangServer
from megatron_vespo.system.ports import find_free_port
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, WeightSyncError
from tests.support.engine_stub import EngineStub

KEY = "a-key-of-this-test"


@pytest.mark.parametrize(
    ("choice", "loopback", "has_key"),
    [
        ("auto", True, False), ("auto", False, True), ("always", True, True), ("always", False, True),
        ("never", True, False), ("never", False, False),
    ],
)  # fmt: skip
def test_when_there_is_a_key(choice, loopback, has_key):
    key = new_api_key(choice, loopback)
    assert (key is not None) == has_key
    if has_key:
        assert len(key) >= 43 and key != new_api_key(choice, loopback)  # 256 bits in base64


@pytest.mark.parametrize("key", [KEY, None])
def test_through_the_pipe(key):
    reading, writing = os.pipe()
    hand_over(key, os.fdopen(writing, "wb"))
    with os.fdopen(reading) as server_input:
        assert receive(server_input) == key


def test_a_server_that_has_ended_takes_no_key():
    reading, writing = os.pipe()
    os.close(reading)
    hand_over(KEY, os.fdopen(writing, "wb"))


@pytest.fixture
def log():
    make_record, text = logging.getLogRecordFactory(), io.StringIO()
    keep_out_of_logs(KEY)
    logger, handler = logging.getLogger("test_api_key"), logging.StreamHandler(text)
    logger.addHandler(handler)
    yield logger, text
    logger.removeHandler(handler)
    logging.setLogRecordFactory(make_record)


def test_no_log_has_the_key(log, capsys):
    logger, text = log
    logger.warning(f"server_args={{'api_key': '{KEY}', 'port': 1}}")
    logger.warning("%s and %d", {"api_key": KEY}, 3)
    logger.warning("%d left", 3)
    assert text.getvalue().splitlines() == [
        f"server_args={{'api_key': '{REPLACEMENT}', 'port': 1}}",
        f"{{'api_key': '{REPLACEMENT}'}} and 3",
        "3 left",
    ]


def test_a_wrong_call_of_logging_does_no_more_harm_than_before(log, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger, text = log
    logger.warning("%d", "three")
    logger.warning("on")
    assert text.getvalue() == "on\n"


def test_several_tokenizer_workers_would_ask_for_no_key():
    check_flags_with_key(["--tp-size", "2", "--tokenizer-worker-num", "1"])
    check_flags_with_key(["--tokenizer-worker-num", "2", "--tokenizer-worker-num", "1"])
    with pytest.raises(ValueError, match="--sglang-tokenizer-worker-num.*--engine-api-key never"):
        check_flags_with_key(["--tokenizer-worker-num", "2"])


@pytest.mark.parametrize("flag", ["--sglang-api-key", "--sglang-admin-api-key"])
def test_no_key_on_the_command_line(flag):
    with pytest.raises(ValueError, match="sets SGLang's .*api-key itself"):
        parse_sglang_flags([flag, KEY])


SERVER = """
import sys
sys.argv.pop(1)
from megatron_vespo.rollout.api_key import receive
key = receive(sys.stdin)
assert key is not None and key not in " ".join(sys.argv), sys.argv
assert key not in open("/proc/self/cmdline").read() + open("/proc/self/environ").read()
sys.exit(7)
"""


def test_the_server_gets_it_by_no_argument_and_no_environment(monkeypatch, tmp_path):
    popen = subprocess.Popen

    def start(command, **options):
        assert command[1:3] == ["-m", "megatron_vespo.rollout.server_process"]
        return popen([sys.executable, "-c", SERVER, *command[3:]], **options)

    monkeypatch.setattr(engine_module.subprocess, "Popen", start)
    engine = SGLangServer("m", "127.0.0.1", find_free_port("127.0.0.1"), [], tmp_path / "log", 60.0, KEY)
    with pytest.raises(engine_module.EngineError, match="exit status 7"):
        engine.start()


@pytest.fixture
def url():
    with EngineStub(api_key=KEY, version="3") as stub:
        yield stub.url


def test_weight_sync_shows_the_key(url):
    admin = EngineAdmin([url], 10.0, "retract", KEY)
    for every in (admin, admin.of([url])):
        every.begin()
        every.settle("/end_weight_update", {})
        every.finish(3)
        [reply] = every.wait([every.submit(url, "/init_weights_update_group", {})])
        assert reply["weight_version"] == "3"


@pytest.mark.parametrize("key", [None, "another"])
def test_without_the_key_weight_sync_is_refused(url, key):
    with pytest.raises(WeightSyncError, match="/begin_weight_update answered 401") as refusal:
        EngineAdmin([url], 10.0, None, key).begin()
    assert key is None or key not in str(refusal.value)


def test_nothing_reads_the_key_from_args():
    """They go into checkpoints as they are."""
    package = Path(engine_module.__file__).parents[1]
    assert [path for path in package.rglob("*.py") if re.search(r"args\.api_key\b", path.read_text())] == []
