"""The folder of --weight-sync disk: runs do not meet, what killed runs have left is removed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.weight_sync.disk_folder import (
    FolderError,
    claim,
    export_folder,
    folder_errors,
    release,
    run_folder,
    sees,
)

CLAIM = (
    "import sys, pathlib; from megatron_vespo.weight_sync.disk_folder import claim;"
    "print(claim(pathlib.Path(sys.argv[1])), flush=True); sys.stdin.read()"
)


@pytest.fixture
def other_run(tmp_path):
    """Call it with a folder: another process claims it, and holds it until it is killed."""
    processes = []

    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_two_runs_have_two_folders(tmp_path):
    one, other = (run_folder(tmp_path, Path("runs") / name / "output") for name in "ab")
    assert one != other and one.parent == other.parent == tmp_path
    assert run_folder(tmp_path, Path("runs/a/../a/output")) == one
    assert export_folder(tmp_path, Path("runs/a/output")).name == one.name.replace("run-", "weight-check-")
    token = claim(one)
    assert claim(other) != token
    assert sees(one, token) and not sees(other, token)


def test_what_killed_runs_have_left_is_removed(tmp_path, other_run):
    own, dead, alive = (tmp_path / f"run-{name}" for name in ("own", "dead", "alive"))
    other_run(alive)
    killed = other_run(dead)
    (dead / "rank-0.weights").write_text("left")
    killed.kill()
    killed.communicate()
    # of another host, whose processes cannot be seen
    far = tmp_path / "run-far"
    far.mkdir()
    (far / "owner.json").write_text(
        json.dumps(json.loads((alive / "owner.json").read_text()) | {"host": "b"})
    )
    (tmp_path / "run-without an owner").mkdir()
    (tmp_path / "mine").mkdir()
    own.mkdir()
    (own / "connection-1").mkdir()
    claim(own)
    assert {path.name for path in tmp_path.iterdir()} == {
        "run-own", "run-alive", "run-far", "run-without an owner", "mine",
    }  # fmt: skip
    assert [path.name for path in own.iterdir()] == ["owner.json"]


def test_a_folder_in_use_is_refused_and_not_removed(tmp_path, other_run):
    folder = tmp_path / "run-x"
    process = other_run(folder)
    with pytest.raises(FolderError) as error:
        claim(folder)
    line = (
        f"--weight-sync-folder {tmp_path}: process {process.pid} of a run with the same --output-dir uses it"
    )
    assert str(error.value) == line
    assert isinstance(error.value, ValueError)  # the user's to change
    process.kill()
    process.communicate()
    release(folder)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FolderError, match=f"^--weight-sync-folder {tmp_path}/file: (File exists|Not a directory)$"
    ):
        claim(tmp_path / "file" / "run-x")


def test_a_folder_that_is_full(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses as on a full disk
    try:
        with pytest.raises(FolderError) as error, folder_errors(tmp_path / "run-x"):
            (tmp_path / "weights").write_bytes(b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = str(error.value)
    assert said.startswith(f"--weight-sync-folder {tmp_path}: File too large, ")
    assert said.endswith(" GB are free; a sync writes up to all weights of an engine")
