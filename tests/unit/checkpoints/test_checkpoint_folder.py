"""The files around Megatron's in a checkpoint: written, refused, cleared away, named."""

import hashlib
import shutil
from collections import namedtuple

import pytest

from megatron_vespo.checkpoints import run_folder as checkpoint_folder
from megatron_vespo.checkpoints.names import BUFFER_NAME, RESERVE_NAME, TRACKER_NAME
from megatron_vespo.checkpoints.run_folder import (
    newest_save,
    prepare,
    read_file,
    release_reserve,
    repair_tracker,
    why_no_room,
)
from tests.support.saved_steps import complete


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "RESERVE_BYTES", 4096)


@pytest.fixture()
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_files_come_back_as_they_were(tmp_path, model):
    folder = tmp_path / "saved/iter_0000004"
    [(name, entry)] = prepare(tmp_path / "saved", folder, model, {BUFFER_NAME: b"groups"}).items()
    assert entry == {"bytes": 6, "sha256": hashlib.sha256(b"groups").hexdigest()}
    assert read_file(folder, name, entry) == b"groups"
    assert (folder / "hf/config.json").read_text() == "{}"
    assert (folder / RESERVE_NAME).stat().st_size == 4096
    release_reserve(folder)
    release_reserve(folder)
    assert not (folder / RESERVE_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"group", b"Groups"])
def test_a_broken_file_is_refused_in_one_line(tmp_path, model, content):
    folder = tmp_path / "saved/iter_0000004"
    entries = prepare(tmp_path / "saved", folder, model, {BUFFER_NAME: b"groups"})
    (folder / BUFFER_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"iter_0000004/rollout_buffer.bin: broken: \d bytes") as refused:
        read_file(folder, BUFFER_NAME, entries[BUFFER_NAME])
    assert "\n" not in str(refused.value)
    (folder / BUFFER_NAME).unlink()
    with pytest.raises(ValueError, match="the file is missing"):
        read_file(folder, BUFFER_NAME, entries[BUFFER_NAME])


def test_leftovers_of_a_killed_save_go(tmp_path, model):
    save, folder = tmp_path / "saved", tmp_path / "saved/iter_0000004"
    complete(save, 2)
    folder.mkdir()
    (folder / "__3_0.distcp").write_text("of a layout with more ranks")
    prepare(save, folder, model, {})
    assert not (folder / "__3_0.distcp").exists()
    assert newest_save(save) == save / "iter_0000002"


def test_a_folder_that_is_named_is_not_named_any_more_while_it_is_written_anew(tmp_path, model):
    save = tmp_path / "saved"
    complete(save, 2)
    prepare(save, save / "iter_0000002", model, {})
    assert newest_save(save) is None


@pytest.mark.parametrize(("word", "named"), [("12\n", "iter_0000012"), ("release", None), ("", None)])
def test_the_newest_save(tmp_path, word, named):
    assert newest_save(tmp_path) is None
    (tmp_path / TRACKER_NAME).write_text(word)
    assert newest_save(tmp_path) == (named and tmp_path / named)


def test_an_empty_tracker_names_the_newest_complete_iteration(tmp_path):
    complete(tmp_path, 2, 10)
    (tmp_path / "iter_0000012").mkdir()  # a save that was killed
    tracker = tmp_path / TRACKER_NAME
    tracker.unlink()
    assert repair_tracker(tmp_path) is None  # no tracker: nobody has saved here yet
    tracker.write_text("2")
    assert repair_tracker(tmp_path) is None
    tracker.write_text("")
    assert repair_tracker(tmp_path) == "iter_0000010"
    assert tracker.read_text() == "10" and repair_tracker(tmp_path) is None


def test_an_empty_tracker_beside_nothing_goes(tmp_path):
    (tmp_path / TRACKER_NAME).write_text("")
    assert repair_tracker(tmp_path) is None
    assert not (tmp_path / TRACKER_NAME).exists()


def test_room_is_compared_with_what_is_needed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(3 * 2**30))
    assert why_no_room(tmp_path, 3 * 2**30) is None
    assert why_no_room(tmp_path, 7 * 2**29) == f"{tmp_path} has 3.00 GiB free, 3.50 GiB are needed"
