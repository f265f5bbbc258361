"""Checkpoints that are written while training goes on, and saves that fail."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.checkpoints import run_folder as checkpoint_folder
from megatron_vespo.checkpoints.names import BUFFER_NAME, RESERVE_NAME, TRACKER_NAME
from tests.support.named_layouts import LAYOUTS

LAYOUT = "ep2"
MIB = 2**20


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Path | None:
    """A file system with room for what is reserved and half a megabyte; None where none can be mounted."""
    folder = tmp_path_factory.mktemp("small")
    size = checkpoint_folder.RESERVE_BYTES + MIB // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saving") / "saved"


@pytest.fixture(scope="module")
def results(on_task, saved, small_disk) -> list[dict]:
    num_ranks, flags = LAYOUTS[LAYOUT]
    more = ["--save", str(saved), "--max-tokens-per-gpu", "256", "--lr", "3e-5", *flags.split()]
    more += ["--small-disk", str(small_disk)] if small_disk else []
    return on_task("saving.py", num_ranks, *more)


def test_what_is_written_in_the_background_is_the_policy_of_then(train, results, saved):
    resumed = train(LAYOUT, "--load", str(saved))
    for rank, (before, after) in enumerate(zip(results, resumed, strict=True)):
        print(f"rank {rank}: pause {before['pause']:.2f} s, save {before['seconds']:.2f} s")
        assert before["problem"] == "None"
        assert after["first_iteration"] == 1 and after["consumed_prompts"] == 7
        np.testing.assert_array_equal(
            after["log_probs"][: len(before["saved_log_probs"])], before["saved_log_probs"]
        )


def test_the_size_is_known_before(results, saved):
    folder = saved / "iter_0000001"
    data = sum(path.stat().st_size for path in folder.glob("*.distcp")) + len(results[0]["buffer"])
    # the files have a head for each tensor as well
    assert 0.8 * data < results[0]["num_bytes"] <= data


def test_a_save_without_room_is_refused_by_all_ranks_and_leaves_nothing(results):
    for result in results:
        assert str(result["refused"]).startswith("no room for ")
        assert result["refused"] == results[0]["refused"]
        assert list(result["folders"]) == ["iter_0000001", TRACKER_NAME]


def test_a_rank_that_cannot_write_fails_all(results):
    for result in results:
        assert str(result["failed"]).startswith("rank 1: ") and "OSError" in str(result["failed"])


def test_a_disk_that_fills_up(results, small_disk):
    if small_disk is None:
        pytest.skip("no file system can be mounted here")
    for result in results:
        # which writer meets it first, and in which words, differs; how much is free is always said
        assert str(result["full"]).startswith("rank ") and "has 0.0" in str(result["full"])
        assert list(result["left_on_full_disk"]) == []
        assert result["free_again"] > checkpoint_folder.RESERVE_BYTES


def test_the_buffer_is_part_of_the_checkpoint(results, saved):
    folder = saved / "iter_0000001"
    assert (folder / BUFFER_NAME).read_bytes() == results[0]["buffer"].tobytes()
    assert not (folder / RESERVE_NAME).exists()
