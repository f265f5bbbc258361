"""Code rewards on a server with SandboxFusion's API, against a stub of it."""

import json
import time

import pytest

from megatron_vespo.rewards import code
from megatron_vespo.rewards.code import CodeReward
from megatron_vespo.rewards.sandbox import SandboxError
from tests.support.sandbox_fusion_stub import sandbox_fusion_stub

SUM = {"type": "stdin", "cases": [["1 2\n", "3\n"], ["-5 5\n", "0\n"], ["7 8", "15"]]}
ADD = {"type": "calls", "function": "add", "cases": [[[1, 2], 3], [[-5, 5], 0], [["a", "b"], "ab"]]}
SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
FUNCTION = "def add(a, b):\n    return a + b"


@pytest.fixture(autouse=True)
def fresh():
    code._sandbox.cache_clear()
    yield
    code._sandbox.cache_clear()


@pytest.fixture
def stub():
    with sandbox_fusion_stub() as server:
        yield server


def score(stub, program, tests, timeout_s=8.0, **settings):
    reward = CodeReward(timeout_s, test_timeout_s=2.0, server_url=stub.url, **settings)
    return reward(f"```python\n{program}\n```", json.dumps(tests), {})


def test_scripts(stub):
    assert score(stub, SCRIPT, SUM) == 1.0
    assert score(stub, "print(3)", SUM) == 0.0
    assert score(stub, "print(3)", SUM, share=True) == pytest.approx(1 / 3)
    assert score(stub, SCRIPT + "\nraise SystemExit(1)", SUM) == 0.0
    first = stub.requests[1]  # after the check
    assert first["language"] == "python" and first["stdin"] == "1 2\n" and 0 < first["run_timeout"] <= 2.0


def test_functions(stub):
    assert score(stub, FUNCTION, ADD) == 1.0
    assert score(stub, "def add(a, b):\n    return 3", ADD, share=True) == pytest.approx(1 / 3)
    assert score(stub, "raise SystemExit(0)", ADD) == 0.0


CHEATS = {
    "prints passed": "import os, sys\nprint('111.')\nos._exit(0)",
    "reads its parent's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')" + "\n" + FUNCTION,
    "reads its parent's input": "import os\nopen(f'/proc/{os.getppid()}/fd/0').read()" + "\n" + FUNCTION,
    "writes to its parent's output": (
        "import os\nopen(f'/proc/{os.getppid()}/fd/1', 'w').write('111')" + "\n" + FUNCTION
    ),
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=list(CHEATS))
def test_cheats_earn_nothing(stub, program):
    assert score(stub, program, ADD, share=True) == 0.0


def test_what_a_function_program_knows_of_its_tests(stub):
    """The expected values are in no file, argument or variable of its process."""
    marked = {"type": "calls", "function": "f", "cases": [[[], "the expected value"]]}
    program = (
        "import gc, sys\n"
        "def f():\n"
        "    texts = [o for o in gc.get_objects() if isinstance(o, (str, dict, list))]\n"
        "    words = 'the expected'\n"
        "    if any(words + ' value' in str(o) for o in [*texts, *sys.argv]):\n"
        "        return words + ' value'\n"
        "    return words"
    )
    assert score(stub, program, marked) == 0.0


def test_faults_of_the_server_are_tried_again(stub):
    score(stub, SCRIPT, SUM)
    sandbox_error = {"status": "SandboxError", "message": "no pod", "run_result": None}
    stub.faults = [500, sandbox_error, 429, {"odd": 1}]
    assert score(stub, SCRIPT, SUM) == 1.0
    assert not stub.faults


def test_a_server_that_keeps_failing_is_an_error_at_the_deadline(stub):
    score(stub, SCRIPT, SUM)
    stub.faults = [500] * 1000
    started = time.monotonic()
    with pytest.raises(SandboxError, match=r"--code-sandbox-url http\S+: /run_code answered 500"):
        score(stub, SCRIPT, SUM, timeout_s=2.0)
    assert time.monotonic() - started < 3.5


def test_a_request_that_the_server_refuses_is_not_repeated(stub):
    score(stub, SCRIPT, SUM)
    stub.faults = [422] * 10
    with pytest.raises(SandboxError, match="answered 422"):
        score(stub, SCRIPT, SUM)
    assert len(stub.faults) == 9


def test_no_server_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("megatron_vespo.rewards.sandbox_server._CHECK_DEADLINE_S", 1.0)
    with pytest.raises(ValueError, match=r"--code-sandbox-url http://127.0.0.1:9: /run_code did not answer"):
        CodeReward(server_url="http://127.0.0.1:9").check()


def test_a_server_of_another_kind_is_refused(stub):
    result = {"status": "Finished", "return_code": 0, "stdout": "7", "stderr": ""}
    stub.faults = [{"status": "Success", "message": "", "run_result": result}]
    with pytest.raises(ValueError, match=r"printed b'7', not 42"):
        CodeReward(server_url=stub.url).check()


def test_time_limits(stub):
    started = time.monotonic()
    assert score(stub, "while True: pass", SUM) == 0.0
    assert time.monotonic() - started < 5.0
