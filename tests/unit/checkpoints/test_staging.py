"""Folders that appear when they are complete."""

import fcntl
import os
import shutil
from collections import namedtuple

import pytest

from megatron_vespo.checkpoints import staging
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.checkpoints.staging import staged


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def fill(target, content="new", force=False, num_bytes=0) -> None:
    with staged(target, num_bytes, force, Ranks()) as folder:
        assert folder == target.parent / f".{target.name}.incomplete"
        (folder / "model.safetensors").write_text(content)


def content(folder) -> list[str]:
    return sorted(os.listdir(folder))


def old_checkpoint(target) -> None:
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    (target / "only the old one has it").write_text("")


def is_old(target) -> bool:
    return (target / "model.safetensors").read_text() == "old" and len(content(target)) == 2


def refused(target, **options) -> str:
    with pytest.raises(ValueError) as error:
        fill(target, **options)
    return str(error.value)


def test_it_appears_at_the_end(tmp_path, target):
    with staged(target, 0, False, Ranks()) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert content(tmp_path) == ["target"] and content(target) == ["file"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing(tmp_path, target, failure, force):
    if force:
        old_checkpoint(target)
    with pytest.raises(failure), staged(target, 0, force, Ranks()) as folder:
        (folder / "file").write_text("x")
        raise failure
    assert content(tmp_path) == (["target"] if force else [])
    assert not force or is_old(target)


def test_an_existing_target(tmp_path, target):
    old_checkpoint(target)
    assert refused(target) == f"{target} is already there; --force replaces it"
    assert is_old(target)
    fill(target, force=True)
    assert content(tmp_path) == ["target"] and content(target) == ["model.safetensors"]
    assert (target / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("file", ["config.json", "manifest.json", "main.py"])
def test_force_replaces_checkpoints_only(tmp_path, file):
    target = tmp_path / "project"
    target.mkdir()
    (target / file).write_text("{}")
    assert refused(target, force=True) == f"{target} is no checkpoint: --force does not replace it"
    assert content(target) == [file] and content(tmp_path) == ["project"]
    assert "is no checkpoint" in refused(target / file, force=True)


@pytest.mark.parametrize(
    "mark", ["model.safetensors.index.json", "latest_checkpointed_iteration.txt", ".metadata"]
)
def test_every_kind_of_checkpoint_is_replaced(target, mark):
    target.mkdir()
    (target / mark).write_text("")
    fill(target, force=True)
    assert content(target) == ["model.safetensors"]


def test_a_link_is_followed(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for force, written in ((False, "1"), (True, "2")):
        with staged(link, 0, force, Ranks()) as folder:
            (folder / "model.safetensors").write_text(written)
        assert link.is_symlink() and content(real) == ["model.safetensors"]
    assert (real / "model.safetensors").read_text() == "2"
    assert content(tmp_path) == ["link", "real"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path, target):
    left = tmp_path / ".target.incomplete"
    (left / "release").mkdir(parents=True)
    (left / "release" / "file").write_text("")
    (left / "file").write_text("")
    elsewhere = tmp_path / "elsewhere"
    old_checkpoint(elsewhere)
    (left / "link").symlink_to(elsewhere)
    fill(target)
    assert content(tmp_path) == ["elsewhere", "target"] and content(target) == ["model.safetensors"]
    assert is_old(elsewhere)


def test_another_process_is_writing(target):
    with staged(target, 0, False, Ranks()) as folder:
        (folder / "file").write_text("x")
        # a descriptor of its own is like another process to flock
        assert refused(target) == f"another process is writing {target}"
        assert (folder / "file").read_text() == "x"
    assert content(target) == ["file"]


def test_nobody_gets_in_before_the_new_name(target, monkeypatch):
    """Bringing everything to the disk takes minutes; the lock holds until the folder has its name."""
    sync, met = staging.sync, []

    def meanwhile(path):
        if not target.exists():
            met.append(refused(target))
        sync(path)

    monkeypatch.setattr(staging, "sync", meanwhile)
    fill(target)
    assert met and set(met) == {f"another process is writing {target}"}
    assert content(target) == ["model.safetensors"]


def test_the_lock_is_free_afterwards(target):
    with pytest.raises(RuntimeError), staged(target, 0, False, Ranks()):
        raise RuntimeError
    fill(target)
    with (target / "model.safetensors").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_killed_between_the_two_renames(tmp_path, target):
    old_checkpoint(tmp_path / ".target.replaced")
    assert refused(target) == f"{target} is already there; --force replaces it"
    assert is_old(target) and content(tmp_path) == ["target"]


def test_interrupted_between_the_two_renames(tmp_path, target, monkeypatch):
    old_checkpoint(target)
    rename = staging.Path.rename

    def interrupted(path, to):
        if path.name == ".target.incomplete":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(staging.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(target, force=True)
    assert content(tmp_path) == ["target"] and is_old(target)


def test_no_parent(tmp_path, target):
    assert refused(tmp_path / "none" / "target") == f"{tmp_path / 'none'} is no folder"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file" / "target") == f"{tmp_path / 'file'} is no folder"


def test_a_parent_that_cannot_be_written(tmp_path, target):
    # a file in the staging folder's place stands for a read-only disk, which does not stop root
    (tmp_path / ".target.incomplete").write_text("")
    assert refused(target) == f"{tmp_path} cannot be written: File exists"


def test_a_full_disk(tmp_path, target, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**39, 2**30))
    assert refused(target, num_bytes=2**31) == f"{tmp_path} has 1.00 GiB free, target needs 2.00 GiB"
    assert content(tmp_path) == []
    fill(target, num_bytes=2**29)
