"""Programs that attack the sandbox: none earns a reward, is late, or leaves something behind."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_vespo.rewards import code
from megatron_vespo.rewards.code import CodeReward
from tests.support.malicious_programs import CHEATS, ESCAPED, SCRIPTS, Targets

ADD = {"type": "calls", "function": "add", "cases": [[[1, 2], 3], [[-5, 5], 0], [["a", "b"], "ab"]]}
REWARD = CodeReward(timeout_s=1.5, test_timeout_s=1.0, memory_mb=256)
MARGIN_S = 2.0  # to end everything, on a busy machine
NOBODY = 65534  # runs programs where this process is root
LEAVING_S = 5.0  # the kernel ends namespaces in the background


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Something to steal, to reach, to kill and to change, for whoever gets out of the sandbox."""
    folder = tmp_path_factory.mktemp("targets")
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text("the secret text")
    os.environ["SANDBOX_TEST_KEY"] = "the secret text"
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for name in ("abstract", "file"):
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(f"\0sandbox-test-{os.getpid()}" if name == "abstract" else str(folder / "socket"))
            server.listen()
        yield Targets(
            SECRET_FILE=str(secret),
            SECRET_TEXT="the secret text",
            OPEN_FOLDER=str(folder),
            TCP_PORT=str(tcp.getsockname()[1]),
            ABSTRACT_SOCKET=f"sandbox-test-{os.getpid()}",
            SOCKET_FILE=str(folder / "socket"),
            VICTIM_PID=str(victim.pid),
        )
        del os.environ["SANDBOX_TEST_KEY"]
        assert victim.poll() is None
        assert sorted(path.name for path in folder.iterdir()) == ["secret", "socket"]
        victim.kill()
        victim.wait()


@pytest.fixture(scope="module")
def sandbox(targets):
    """The sandbox that all programs share; at the end nothing of them is left."""
    code._sandbox.cache_clear()
    before = traces()
    sandbox = code._sandbox(None)
    yield sandbox
    assert sandbox._process.poll() is None, "one program ended the zygote"
    sandbox.close()
    code._sandbox.cache_clear()
    assert traces() == before


def traces() -> dict:
    """What a program could leave on this machine."""
    orphans = [
        process.pid
        for process in psutil.process_iter(["cmdline", "ppid"])
        if process.info["ppid"] == 1 and any("jail.zygote" in word for word in process.info["cmdline"] or ())
    ]
    folders = [Path("/tmp"), Path("/dev/shm"), Path("/")]
    return {
        "processes": sorted(child.pid for child in psutil.Process().children(recursive=True)),
        "orphans": orphans,
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "files": sorted(str(path) for folder in folders for path in folder.iterdir() if is_of_nobody(path)),
        "shared memory": Path("/proc/sysvipc/shm").read_text(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def is_of_nobody(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_uid == NOBODY
    return False


def score(sandbox, source: str, tests: dict) -> float:
    """The reward of a program, which must be there in time and leave no process."""
    started = time.monotonic()
    reward = REWARD(f"````python\n{source}\n````", json.dumps(tests), {})
    assert time.monotonic() - started < REWARD.timeout_s + MARGIN_S
    zygote = psutil.Process(sandbox._process.pid)
    while (left := living_children(zygote)) and time.monotonic() - started < LEAVING_S:
        time.sleep(0.01)
    assert not left
    return reward


def living_children(process: psutil.Process) -> list[psutil.Process]:
    children = process.children(recursive=True)[1:]  # without the one that forks programs
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_that_attack(sandbox, targets, name):
    tests = {"type": "stdin", "cases": [["", ESCAPED]]}
    assert score(sandbox, targets.put_into(SCRIPTS[name]), tests) == 0.0


@pytest.mark.parametrize("name", CHEATS)
def test_functions_that_cheat(sandbox, name):
    assert score(sandbox, CHEATS[name], ADD) == 0.0


def test_a_script_cannot_know_what_it_should_print(sandbox):
    """What it was not told is in no object of its process."""
    tests = {"type": "stdin", "cases": [["", "the expected output"]]}
    source = """
import gc
words = "the expected"
texts = [repr(o) for o in gc.get_objects() if type(o) in (str, dict, list, tuple)]
print(words + (" output" if any(words + " output" in text for text in texts) else ""))
"""
    assert score(sandbox, source, tests) == 0.0


def test_an_honest_program_after_all_of_them(sandbox):
    assert score(sandbox, "def add(a, b):\n    return a + b", ADD) == 1.0
    assert score(sandbox, "print('escaped')", {"type": "stdin", "cases": [["", ESCAPED]]}) == 1.0
