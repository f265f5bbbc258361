"""A checkpoint holds plain values: no object of this package, so that its modules may be renamed."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

# reads everything that is no tensor in a checkpoint's folder, without this package
WITHOUT_THE_PACKAGE = """
import io, pathlib, pickle, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron_vespo":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

folder = pathlib.Path(sys.argv[1])
metadata = FileSystemReader(folder).read_metadata()
names = [n for n, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
for name in names:
    place = metadata.storage_data[MetadataIndex(name)]
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        value = torch.load(io.BytesIO(file.read(place.length)), weights_only=False)
    if name.startswith("common_state/"):
        args = value[0]["args"]
        print(args.rollout_state["iteration"], args.policy_loss, len(names))
print(sorted(name for name in sys.modules if name.startswith("megatron_vespo")))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("plain") / "saved"


@pytest.fixture(scope="module")
def result(on_task, saved) -> dict:
    return on_task("plain_checkpoint.py", 1, "--save", str(saved))[0]


def read_without_the_package(folder) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_it_opens_without_this_package(result, saved):
    read = read_without_the_package(saved / "iter_0000001")
    assert read.returncode == 0, read.stderr
    arguments, modules = read.stdout.splitlines()
    assert arguments.startswith("1 vespo ") and modules == "[]"


def test_an_object_of_this_package_would_be_found(result, saved):
    read = read_without_the_package(saved / "iter_0000002")
    assert "ModuleNotFoundError: megatron_vespo" in read.stderr


def test_a_save_leaves_the_arguments_as_they_were(result):
    assert list(result["changed"]) == []


def test_a_checkpoint_with_objects_that_are_gone_is_resumed(result):
    assert result["iteration"] == 2 and result["consumed_prompts"] == 5
    assert list(result["state"]) == ["consumed_prompts", "iteration"]
    np.testing.assert_array_equal(result["resumed_log_probs"], result["log_probs"])
