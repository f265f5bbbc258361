"""Every command, given mistakes: one line that names the flag, the file or the variable, and no traceback.

VESPO_FUZZ_SEED and VESPO_FUZZ_CASES try others by hand; a failure names its case and the command.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tests.support.command_files import copy_files, write_files
from tests.support.command_server import ACCEPTED
from tests.support.mistakes import RECIPE, RIGHT, Case, cases, cold_cases

SEED = int(os.environ.get("VESPO_FUZZ_SEED", "0"))
NUMBER = int(os.environ.get("VESPO_FUZZ_CASES", "300"))
QUICK = 60  # cases of every test run; the others are slow ones
DEADLINE_S = 60.0  # of a case; most take less than a tenth of a second


class Server:
    """Answers cases, in folders of their own."""

    def __init__(self, source: Path, folder: Path):
        self.source, self._folder, self._count = source, folder, 0
        program = [sys.executable, "-m", "tests.support.command_server"]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, case: Case) -> dict:
        self._count += 1
        folder = self._folder / str(self._count)
        copy_files(self.source, folder)
        case.prepare(folder)
        env = {name: value for name, value in {**os.environ, **case.env}.items() if value is not None}
        if not case.warm:
            program = [sys.executable, "-m", "megatron_vespo", *case.argv]
            done = subprocess.run(
                program, cwd=folder, env=env, capture_output=True, text=True, timeout=DEADLINE_S
            )
            return {"code": done.returncode, "out": done.stdout, "err": done.stderr}
        asked = {"argv": case.argv, "env": env, "folder": str(folder), "deadline": DEADLINE_S}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        shutil.rmtree(folder)
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    write_files(source, RECIPE)
    server = Server(source, tmp_path_factory.mktemp("cases"))
    try:
        argv = ["convert", "hf-to-megatron", str(source / "model"), str(source / "megatron"), "--quiet"]
        assert server.answer(Case("convert", argv, "", []))["code"] == 0
        yield server
    finally:
        server.close()


def wrong(case: Case, answer: dict) -> str | None:
    """What is wrong with an answer to a mistake."""
    code, err = answer["code"], answer["err"]
    if code is None:
        return f"no answer within {DEADLINE_S:g} s"
    if "Traceback" in answer["out"] + err or "internal error" in err or "traceback is in" in err:
        return "a traceback"
    if case.valid:
        return None
    if code in (0, ACCEPTED):
        return "accepted"
    if code not in (1, 2):
        return f"exit code {code}"
    # argparse shows the usage, and OpenMP's library has its own say
    lines = [line for line in err.splitlines() if line and not line.startswith(("usage:", " ", "libgomp:"))]
    said = lines[0] if len(lines) == 1 else ""
    if case.command in ("plan", "convert verify", "doctor") and not lines:
        said = answer["out"]  # what these are asked for
    elif not said.startswith("megatron-vespo"):
        return f"{len(lines)} lines"
    return None if any(name in said for name in case.names) else f"does not name {' or '.join(case.names)}"


@pytest.mark.long
@pytest.mark.parametrize("command", RIGHT)
def test_without_a_mistake_it_is_accepted(server, command):
    answer = server.answer(Case(command, RIGHT[command].split(), "", []))
    if command == "convert modelopt" and "is not installed" in answer["err"]:
        pytest.skip("nvidia-modelopt is not installed")
    assert answer["code"] in (0, ACCEPTED), answer


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("first", "end"), [(0, QUICK), pytest.param(QUICK, NUMBER, marks=pytest.mark.slow)])
def test_mistakes_are_answered_in_one_line(server, capsys, first, end):
    failures, seconds, tried = [], [], Counter()
    for index, case in islice(enumerate(cases(SEED, end)), first, None):
        answer = server.answer(case)
        seconds.append(answer["seconds"])
        tried[case.command] += 1
        if problem := wrong(case, answer):
            command = shlex.join(["megatron-vespo", *case.argv])
            failures.append(f"case {index}, {case.what}: {problem}\n  {command}\n  {answer['err'][-600:]!r}")
    with capsys.disabled():
        print(
            f"\nseed {SEED}: {len(seconds) - len(failures)} of {len(seconds)} mistakes answered in one line, "
            f"{sum(seconds) / len(seconds):.2f} s each, at most {max(seconds):.1f} s: "
            + ", ".join(f"{command} {count}" for command, count in sorted(tried.items()))
        )
    assert not failures, f"seed {SEED}:\n" + "\n".join(failures)


@pytest.mark.long
@pytest.mark.parametrize("case", cold_cases(), ids=lambda case: f"{case.command} {case.what}")
def test_variables_that_count_when_a_process_starts(server, case):
    assert (problem := wrong(case, answer := server.answer(case))) is None, (problem, answer)
