"""tests/run.sh and .ci/run: which stages run, in which order, and that a failed one fails the whole."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STUB = '#!/bin/bash\necho "$*" >>given\nif [[ -n $FAIL && "$*" == *"$FAIL"* ]]; then exit $CODE; fi\n'
FORMAT_CHECKS = ["-m ruff check", "-m ruff format --check"]
TYPE_CHECK = "-m pyright"


@pytest.fixture
def run(tmp_path):
    """Runs a script in a folder whose Python only notes what it is asked; the exit code and the notes."""
    for name in ("tests/run.sh", ".ci/run"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests/unit").mkdir()
    (tmp_path / "tests/golden").mkdir()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    (tmp_path / "patches/cpu").mkdir(parents=True)
    (tmp_path / "patches/cpu/setup_env.sh").write_text("")

    def call(*words: str, fail: str = "", code: int = 1) -> tuple[int, list[str]]:
        done = subprocess.run(
            ["bash", *words], cwd=tmp_path, timeout=60, stdout=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "FAIL": fail, "CODE": str(code)},
        )  # fmt: skip
        return done.returncode, (tmp_path / "given").read_text().splitlines()

    return call


def checked(code: int, given: list[str]) -> list[str]:
    """What runs beside and after the checks, which all have run; pyright does beside the tests."""
    assert code == 0 and given[:2] == FORMAT_CHECKS and TYPE_CHECK in given
    return [line for line in given[2:] if line != TYPE_CHECK]


@pytest.mark.parametrize("words", [["tests/run.sh"], [".ci/run"]])
def test_the_full_lane_has_the_checks(run, words):
    code, given = run(*words)
    unit, others = checked(code, given)
    assert "-m not slow" in unit and unit.endswith("--numprocesses 2 --dist loadfile tests/unit")
    assert "-m not slow" in others and others.endswith(" tests/golden")


def test_the_fast_lane_has_the_short_unit_tests(run):
    code, given = run("tests/run.sh", "--fast")
    [tests] = checked(code, given)
    assert "not long" in tests and tests.endswith(" tests/unit")


def test_paths_are_pytests_alone(run):
    code, [given] = run("tests/run.sh", "tests/unit", "-k", "phi")
    assert code == 0 and given.endswith("-k phi tests/unit")


def test_a_folder_in_which_arguments_choose_no_test(run):
    assert run("tests/run.sh", "-k", "phi", fail="tests/golden", code=5)[0] == 0
    assert run("tests/run.sh", "-k", "phi", fail="tests/golden", code=1)[0] == 1
    assert run("tests/run.sh", fail="tests/golden", code=5)[0] == 5
    assert run("tests/run.sh", "tests/golden", "-k", "phi", fail="tests/golden", code=5)[0] == 5


@pytest.mark.parametrize(
    "stage", ["ruff check", "ruff format", "pyright", "loadfile tests/unit", "tests/golden"]
)
def test_a_failed_stage_fails_ci(run, stage):
    code, given = run(".ci/run", fail=stage)
    assert code != 0 and any(stage in line for line in given)
