"""Files that are replaced as a whole or not at all."""

import os

import pytest

from megatron_vespo.system.disk import replacing, sync, write_atomically


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, "für")
    assert path.read_bytes() == "für".encode()
    write_atomically(path, b"\xff\r\n")
    assert path.read_bytes() == b"\xff\r\n"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_the_disk_has_it_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append((os.fstat(descriptor).st_size, path.exists()))
    )
    write_atomically(path, "four")
    assert seen == [(4, False)]


def test_paths_streams_and_descriptors_are_synced(tmp_path, monkeypatch):
    path, sizes = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    with path.open("wb") as stream:
        stream.write(b"buffered")
        sync(stream)
        sync(stream.fileno())
    sync(path)
    assert sizes == [8, 8, 8]
