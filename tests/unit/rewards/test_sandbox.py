"""The sandbox of code rewards: what ends with whom, who may run it, and what a program may do in it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_vespo.rewards import code
from megatron_vespo.rewards.code import CodeReward
from megatron_vespo.rewards.pool import RewardItem, RewardPool
from megatron_vespo.rewards.sandbox import Limits, Sandbox, SandboxError
from tests.support.malicious_programs import WHAT_IS_OUTSIDE

LIMITS = Limits(cpu_s=2.0)
SLEEP = "import time\nprint('ready', flush=True)\ntime.sleep(1000)"
ONE_CASE = json.dumps({"type": "stdin", "cases": [["", "ready"]]})


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


def run(sandbox, source: str, stdin: str = "", limits: Limits = LIMITS, seconds: float = 5.0):
    return sandbox.run_script(source, stdin, limits, time.monotonic() + seconds)


def call(sandbox, source: str, tests: dict, **settings) -> list[bool]:
    settings = {"call_timeout_s": 2.0, "stop_at_failure": False, **settings}
    return sandbox.run_tests([source], tests, LIMITS, time.monotonic() + 5.0, **settings)


@pytest.mark.parametrize(
    ("source", "stdin", "printed"),
    [
        ("print(input())", "text\n", "text\n"),
        ("import sys\nprint(sys.stdin.read().upper())", "é\n1", "É\n1\n"),
        ("import sys\nfor line in sys.stdin:\n    print(int(line) * 2)", "1\n2\n", "2\n4\n"),
        ("import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())", "a b", "a b"),
        ("if __name__ == '__main__':\n    print(1)", "", "1\n"),
        ("import sys\nprint(1)\nsys.exit()", "", "1\n"),
        ("exit(print(2))", "", "2\n"),
        ("import numpy as np\nprint(np.arange(3).sum())", "", "3\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\nprint(A().x)", "", "3\n"),
        ("from __future__ import annotations\nprint(3)", "", "3\n"),
        ("open('x', 'w').write('3')\nprint(open('x').read())", "", "3\n"),
        ("open('/tmp/x', 'w').write('3')\nprint(open('/tmp/x').read())", "", "3\n"),
        ("import tempfile\nwith tempfile.TemporaryFile() as file:\n    print(file.write(b'abc'))", "", "3\n"),
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
            "def f(n):\n    return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(50000)))\n"
            "t.start()\nt.join()",
            "",
            "50000\n",
        ),
        ("import threading\nthreading.Thread(target=lambda: print(3)).start()", "", "3\n"),
        ("import time\ntime.sleep(0.1)\nprint(time.time() > 0)", "", "True\n"),
        ("print(sorted({'b', 'a', 'c'}, key=hash) == sorted({'c', 'a', 'b'}, key=hash))", "", "True\n"),
    ],
)
def test_ordinary_scripts(sandbox, source, stdin, printed):
    if "/tmp" in source and any(path.startswith("/tmp/") for path in (sys.prefix, sys.base_prefix)):
        pytest.skip("Python lies in /tmp, which then is read-only to programs: see SCRATCH in jail/root.py")
    result = run(sandbox, source, stdin)
    assert (result.status, result.exit_status, result.stdout.decode()) == ("ended", 0, printed)


def test_a_program_leaves_nothing_for_the_next_one(sandbox):
    write = "import builtins, os, sys\nopen('x', 'w').write('3')\nbuiltins.left = 1\nsys.path.append('left')"
    assert run(sandbox, write).exit_status == 0
    look = "import builtins, os, sys\nprint(os.listdir('.'), hasattr(builtins, 'left'), 'left' in sys.path)"
    assert run(sandbox, look).stdout == b"[] False False\n"


@pytest.mark.parametrize(
    ("source", "status", "exit_status"),
    [
        ("raise ValueError", "ended", 1),
        ("raise SystemExit(3)", "ended", 3),
        ("def f(:", "ended", 1),
        ("import os\nos.abort()", "ended", -signal.SIGSEGV),
        ("while True: pass", "ended", -signal.SIGKILL),  # the limit of processor time
        ("import time\ntime.sleep(100)", "timeout", None),
        ("while True: print('x' * 1000)", "output", None),
    ],
)
def test_how_scripts_end(sandbox, source, status, exit_status):
    result = run(sandbox, source, limits=Limits(cpu_s=1.0), seconds=2.5)
    assert (result.status, result.exit_status) == (status, exit_status)


VALUES = [
    None, True, 0, -(10**60), 1.5, float("inf"), 1e-320, "é", "", b"\x00\xff", [1, [2]], (1, (2,)),
    {1: "a"}, {(1, 2): {3}}, frozenset({1}), 2 + 1j, range(1, 9, 2), {"int": 3}, {"error": "x"}, [],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_of_functions(sandbox, value):
    """They arrive with value and type, in both directions."""
    tests = {
        "type": "asserts",
        "setup": "",
        "tests": [
            f"inf = float('inf')\nx = same({value!r})\nassert x == {value!r} and type(x) is type({value!r})"
        ],
        "functions": {"same": "same"},
    }
    source = f"inf = float('inf')\ndef same(x):\n    assert x == {value!r}\n    return x"
    assert call(sandbox, source, tests) == [True]


def test_results_of_other_types(sandbox):
    source = """
import collections, decimal, fractions, itertools
import numpy as np
def f(kind):
    return {
        "generator": lambda: (x for x in [1, 2]), "map": lambda: map(abs, [1, -2]),
        "keys": {1: 2, 2: 3}.keys, "array": lambda: np.array([1, 2]), "scalar": lambda: np.int64(3),
        "counter": lambda: collections.Counter("aab"), "deque": lambda: collections.deque([1, 2]),
        "decimal": lambda: decimal.Decimal("0.1"), "fraction": lambda: fractions.Fraction(1, 3),
        "object": object, "function": lambda: f,
    }[kind]()
"""
    setup = "import collections, decimal, fractions"
    tests = [
        "assert list(f('generator')) == [1, 2]", "assert list(f('map')) == [1, 2]",
        "assert set(f('keys')) == {1, 2}",
        "assert f('array') == [1, 2]", "assert f('scalar') == 3", "assert f('counter') == {'a': 2, 'b': 1}",
        "assert f('deque') == collections.deque([1, 2])", "assert f('decimal') == decimal.Decimal('0.1')",
        "assert f('fraction') * 3 == 1", "f('object')", "f('function')",
    ]  # fmt: skip
    found = call(
        sandbox, source, {"type": "asserts", "setup": setup, "tests": tests, "functions": {"f": "f"}}
    )
    assert found == [True] * 9 + [False] * 2


def test_exceptions_of_functions(sandbox):
    tests = [
        "try:\n    f(0)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'zero'",
        "try:\n    f(1)\nexcept Exception:\n    pass",
        "try:\n    f(2)\nexcept BaseException:\n    pass",  # the program is gone: nobody may catch that
        "pass",
    ]
    source = """
import os
class Own(Exception):
    pass
def f(n):
    if n == 2:
        os._exit(0)
    raise ValueError('zero') if n == 0 else Own
"""
    found = call(sandbox, source, {"type": "asserts", "setup": "", "tests": tests, "functions": {"f": "f"}})
    assert found == [True, True, False]


@pytest.mark.parametrize(
    ("value", "passes"), [("2.0", True), ("2.0 + 1e-9", True), ("[]", False), ("[2.0]", False)]
)
def test_an_empty_list_is_close_to_no_number(sandbox, value, passes):
    """Public sets compare floats by numpy.allclose, whose broadcasting a policy would exploit."""
    tests = {
        "type": "asserts",
        "setup": "import numpy as np\nfrom numpy import allclose",
        "tests": ["assert np.allclose(f(), 2.0, rtol=1e-07, atol=1e-06)", "assert allclose(f(), 2.0)"],
        "functions": {"f": "f"},
    }
    assert call(sandbox, f"def f():\n    return {value}", tests) == [passes] * 2


def test_python_below_tmp(tmp_path):
    """A virtual environment in /tmp is not hidden by the folder that programs may write to."""
    assert str(tmp_path).startswith("/tmp/")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (packages / "own_package.py").write_text("NUMBER = 7\n")
    command = f"""
import sys, time
sys.path.insert(0, {os.getcwd()!r})
from megatron_vespo.rewards.sandbox import Limits, Sandbox
source = "import own_package\\nopen('x', 'w').close()\\nprint(own_package.NUMBER)"
print(Sandbox().run_script(source, "", Limits(), time.monotonic() + 10).stdout)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-c", command],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.stdout == "b'7\\n'\n", done.stderr


@pytest.mark.parametrize("who", ["worker", "group"])
def test_what_a_killed_worker_leaves(who):
    """Nothing, whether the reward worker is killed alone or as a group."""
    command = f"""
import time
from megatron_vespo.rewards.sandbox import Limits, Sandbox
sandbox = Sandbox()
print(sandbox._process.pid, flush=True)
sandbox.run_script({SLEEP!r}, "", Limits(), time.monotonic() + 1000)
"""
    worker = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert worker.stdout is not None
    zygote = psutil.Process(int(worker.stdout.readline()))
    family = wait_for(lambda: len(found := zygote.children(recursive=True)) == 2 and found)
    if who == "worker":
        worker.kill()
    else:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    wait_for(lambda: not any(map(is_alive, [zygote, *family])))


def test_what_a_killed_guard_leaves(sandbox):
    """The kernel ends a program whose guard is killed; the sandbox goes on."""
    zygote = psutil.Process(sandbox._process.pid)
    found: list[psutil.Process] = []

    def kill() -> None:
        family = wait_for(lambda: len(children := zygote.children(recursive=True)) == 2 and children)
        found.extend(family)
        family[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SandboxError, match="guard"):
        run(sandbox, SLEEP, seconds=20.0)
    thread.join()
    wait_for(lambda: not any(map(is_alive, found)))
    assert run(sandbox, "print(3)").stdout == b"3\n"


def test_the_reward_goes_on_after_its_zygote_was_killed():
    reward = CodeReward()
    response = "```python\nprint('ready')\n```"
    assert reward(response, ONE_CASE, {}) == 1.0
    code._sandbox(None)._process.kill()
    code._sandbox(None)._process.wait()
    with pytest.raises(SandboxError, match="has ended"):
        reward(response, ONE_CASE, {})
    assert reward(response, ONE_CASE, {}) == 1.0


def test_a_pool_that_is_closed_while_programs_run_leaves_nothing():
    before = psutil.Process().children(recursive=True)
    pool = RewardPool(CodeReward(timeout_s=60.0, test_timeout_s=60.0), 2, timeout_s=1.0)
    try:
        items = [RewardItem(f"```python\n{SLEEP}\n```", ONE_CASE, {}, ended=True)] * 2
        assert [result.status for result in pool.score(items)] == ["timeout"] * 2
    finally:
        pool.close()
    wait_for(lambda: psutil.Process().children(recursive=True) == before)


AS_USER = """
import json, os, sys, time
sys.path.insert(0, {folder!r})
assert os.geteuid() == 1000, os.geteuid()
from megatron_vespo.rewards.sandbox import Limits, Sandbox
from tests.support.malicious_programs import SCRIPTS, Targets
sandbox = Sandbox()
targets = Targets({folder!r} + "/README.md", "VESPO", {open!r}, "9", "none", "/none", str(os.getpid()))
for name in {names!r}:
    result = sandbox.run_script(targets.put_into(SCRIPTS[name]), "", Limits(1.0), time.monotonic() + 1.0)
    assert b"escaped" not in result.stdout, name
look = "import os\\nprint(os.getuid(), os.listdir('.'))"
print(sandbox.run_script(look, "", Limits(), time.monotonic() + 5).stdout)
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_as_an_ordinary_user(tmp_path):
    """A user without any rights, to whom Python's own files belong: attacks on files fail all the same."""
    command = AS_USER.format(folder=os.getcwd(), open=str(tmp_path), names=list(WHAT_IS_OUTSIDE))
    done = subprocess.run(
        ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", command],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "b'1000 []\\n'", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_a_kernel_that_makes_no_namespaces_is_refused():
    command = "from megatron_vespo.rewards.loading import load_reward_function\nload_reward_function('code')"
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", sys.executable, "-c", command],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: no sandbox for code rewards: unshare: ")
    assert last.endswith("or --code-sandbox-url must name a sandbox server")


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
    return found
