"""The doctor as a user starts it: alone, as the tasks of a step, and where something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

pytestmark = pytest.mark.timeout(600)

COMMAND = [sys.executable, "-m", "megatron_vespo", "doctor"]
SLURM = ("SLURM_", "RAY_ADDRESS")


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With a scontrol that lists one node."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 127.0.0.1\n")
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SLURM)}
    return kept | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def start(environment: dict[str, str], *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def task(environment: dict[str, str], rank: int, size: int, job: str) -> dict[str, str]:
    return environment | {
        "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0", "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0",
    }  # fmt: skip


def statuses(report: Path) -> dict[str, str]:
    return {line["check"]: line["status"] for line in json.loads(report.read_text())["lines"]}


def test_alone(environment, tmp_path):
    doctor = start(environment, "--shared-dir", str(tmp_path), "--json", str(tmp_path / "report.json"))
    output, _ = doctor.communicate(timeout=590)
    print(output)
    found = statuses(tmp_path / "report.json")
    for check in ("python", "torch", "megatron-core", "sglang", "ray", "transformers", "patches", "GPUs"):
        assert found[check] == "ok", output
    assert found["gloo all-reduce"] == found["environment"] == "ok", output
    assert "processes" not in found and "clock" not in found  # there is one
    assert doctor.returncode == int("FAIL" in found.values())
    assert len(output.splitlines()) < 40
    assert not list(tmp_path.glob(".megatron-vespo-doctor*"))


@pytest.mark.slow
def test_two_tasks_and_one_of_them_is_broken(environment, tmp_path):
    """The second has another transformers, and names an interface that is not there."""
    other = tmp_path / "site" / "transformers-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 1.0\n")
    broken = environment | {
        "PYTHONPATH": f"{other.parent}{os.pathsep}{environment.get('PYTHONPATH', '')}",
        "NCCL_SOCKET_IFNAME": "nowhere0",
    }
    flags = "--shared-dir", str(tmp_path), "--json", str(tmp_path / "report.json")
    tasks = [start(task(of, rank, 2, "71"), *flags) for rank, of in enumerate((environment, broken))]
    output, silent = (each.communicate(timeout=590)[0] for each in tasks)
    print(output)
    found = statuses(tmp_path / "report.json")
    assert found["processes"] == found["clock"] == found["shared folder"] == found["torch"] == "ok", output
    assert found["gloo all-reduce"] == "ok" and "2 processes" in output
    assert found["transformers"] == "warn" and found["environment"] == "FAIL"
    assert "(rank 1): 1.0, " in output and "(rank 1): NCCL_SOCKET_IFNAME=nowhere0" in output
    assert silent == ""
    assert [each.returncode for each in tasks] == [1, 1]


@pytest.mark.slow
def test_a_task_that_never_comes(environment, tmp_path):
    program = (
        "import sys; from megatron_vespo.commands.doctor import command; command.ARRIVAL_S = 3.0; "
        "sys.exit(command.main(sys.argv[1:]))"
    )
    flags = ["--shared-dir", str(tmp_path), "--json", str(tmp_path / "report.json")]
    alone = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, env=task(environment, 0, 3, "72"),
        capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert alone.returncode == 1
    assert "of 3, these have not come or gone: ranks 1, 2" in alone.stdout
    found = statuses(tmp_path / "report.json")
    assert found["processes"] == found["gloo all-reduce"] == "FAIL" and found["torch"] == "ok"
