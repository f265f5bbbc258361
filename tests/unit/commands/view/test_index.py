"""The index of recorded responses: what is in it, and that it follows the files."""

import os
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from megatron_vespo.commands.view import index as index_module
from megatron_vespo.commands.view.index import RunIndex, cache_folder
from megatron_vespo.data.step_records import FOLDER_NAME, read_step, record_path, write_step
from tests.support.step_records import random_step, write_steps


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    write_steps(folder / FOLDER_NAME, 3, groups=2, group_size=3)
    return folder


@pytest.fixture
def index(run, tmp_path):
    return RunIndex(run, tmp_path / "cache")


def select(index: RunIndex, sql: str) -> list[tuple]:
    with index.reading() as connection:
        return connection.execute(sql).fetchall()


def path_of(run, step):
    return record_path(run / FOLDER_NAME, step)


def test_every_response_has_a_row_with_the_records_numbers(run, index):
    assert index.refresh() == 3
    record = read_step(path_of(run, 2))
    rows = select(
        index,
        "SELECT idx, grp, prompt_id, reward, advantage, sign, log_w, weight, staleness, mismatch, length,"
        " given, lag, finish, status, source, mini_batch, text"
        " FROM responses JOIN texts ON texts.rowid = responses.id WHERE step = 2 ORDER BY idx",
    )
    assert len(rows) == 6
    for i, (row, completion) in enumerate(zip(rows, record.completions, strict=True)):
        given = (
            0
            if completion.segments is None
            else sum(n for w, n in completion.segments.spans() if w == "tool")
        )
        assert row[:4] == (i, record.group_ids[i], completion.prompt.prompt_id, completion.reward)
        assert row[4] == pytest.approx(record.advantages[i]) and row[5] == np.sign(record.advantages[i])
        assert row[6:8] == (pytest.approx(record.log_w[i]), pytest.approx(record.weight[i]))
        assert row[8] + row[9] == pytest.approx(row[6], abs=1e-6)
        assert row[9] == pytest.approx(record.log_mismatch_in_w[i])
        assert row[10:12] == (completion.num_sampled, given)
        # weights of version 1 are trained in optimizer step 2
        assert row[12] == 1 - completion.policy_versions.oldest
        assert row[13:15] == (completion.finish_reason, "ok")
        assert row[15] == completion.prompt.metadata["data_source"] and row[16] == 1
        assert row[17] == record.text(completion.token_ids)
    assert any(row[11] for row in rows)  # a response with given tokens is among them


def test_unknown_numbers_are_null(run, index):
    record = random_step(4)
    unknown = np.full_like(record.log_w, np.nan)
    write_step(
        path_of(run, 4),
        replace(record, log_mismatch_in_w=unknown, log_mismatch=unknown, pi_old=None, pieces={}),
    )
    index.refresh()
    found = select(index, "SELECT staleness, mismatch, log_w, text FROM responses JOIN texts"
                          " ON texts.rowid = responses.id WHERE step = 4")  # fmt: skip
    assert {(row[0], row[1], row[3]) for row in found} == {(None, None, "")}
    assert all(row[2] is not None for row in found)


def test_only_changed_files_are_read(run, index, monkeypatch):
    index.refresh()
    read = []
    monkeypatch.setattr(index_module, "read_step", lambda path: read.append(path.name) or read_step(path))
    assert index.refresh() == 0 and read == []
    write_step(path_of(run, 4), random_step(4))
    assert index.refresh() == 1 and read == ["step-000004.npz"]


def test_a_rewritten_file_replaces_its_rows_and_a_removed_one_is_forgotten(run, index):
    index.refresh()
    [(before,)] = select(index, "SELECT text FROM texts WHERE rowid = 2 << 20")
    write_step(path_of(run, 2), random_step(2, seed=9))  # a resumed run trains step 2 anew
    path_of(run, 3).unlink()
    assert index.refresh() == 2
    assert select(index, "SELECT step, count(*) FROM responses GROUP BY step") == [(1, 6), (2, 16)]
    assert select(index, "SELECT step FROM files") == [(1,), (2,)]
    record = read_step(path_of(run, 2))
    [(after,)] = select(index, "SELECT text FROM texts WHERE rowid = 2 << 20")
    assert after == record.text(record.completions[0].token_ids) != before
    assert select(index, "SELECT count(*) FROM texts") == [(22,)]


def test_damaged_files_are_listed_and_others_are_not_lost(run, index):
    whole = path_of(run, 2).read_bytes()
    path_of(run, 2).write_bytes(whole[: len(whole) // 2])
    index.refresh()
    state = index.state()
    assert (state["files"], state["indexed"], state["responses"]) == (3, 3, 12)
    [line] = state["damaged"]
    assert "step-000002.npz" in line and "\n" not in line
    path_of(run, 2).write_bytes(whole)
    index.refresh()
    assert index.state()["damaged"] == [] and index.state()["responses"] == 18


def test_a_name_with_a_number_that_is_no_step_is_left_alone(run, index):
    (run / FOLDER_NAME / f"step-{10**24}.npz").write_bytes(b"")
    assert index.refresh() == 3 and index.state()["files"] == 3


def test_an_index_of_another_version_is_built_anew(run, index, tmp_path):
    index.refresh()
    with closing(sqlite3.connect(index.file)) as connection:
        connection.executescript(
            "DROP TABLE responses; CREATE TABLE responses (old); PRAGMA user_version = 999;"
        )
    again = RunIndex(run, tmp_path / "cache")
    assert again.file == index.file and again.refresh() == 3
    assert select(again, "SELECT count(*) FROM responses") == [(18,)]


def test_a_damaged_index_is_built_anew(run, index, tmp_path):
    index.refresh()
    for suffix in ("-wal", "-shm"):
        index.file.with_name(index.file.name + suffix).unlink(missing_ok=True)
    index.file.write_bytes(b"no database at all" * 500)
    again = RunIndex(run, tmp_path / "cache")
    assert again.refresh() == 3


def test_two_runs_of_one_name_have_two_indexes(tmp_path):
    runs = [tmp_path / parent / "run" for parent in ("a", "b")]
    for run in runs:
        run.mkdir(parents=True)
    assert len({RunIndex(run, tmp_path / "cache").file for run in runs}) == 2


@pytest.mark.parametrize("name", [os.fsdecode(b"no text \xff"), "a" * 250, "\u6f22" * 80])
def test_any_name_of_a_run_will_do(tmp_path, name):
    folder = tmp_path / name
    write_steps(folder / FOLDER_NAME, 1, groups=1, group_size=2)
    path_of(folder, 2).write_bytes(b"damaged")
    index = RunIndex(folder, tmp_path / "cache")
    assert index.refresh() == 2
    assert index.state()["responses"] == 2 and len(index.state()["damaged"]) == 1


def test_a_source_with_half_a_character(run, index):
    record = read_step(path_of(run, 1))
    for completion in record.completions:
        completion.prompt.metadata["data_source"] = "half \ud83d"
    write_step(path_of(run, 1), record)
    index.refresh()
    assert select(index, "SELECT DISTINCT source FROM responses WHERE step = 1") == [("half ?",)]


def test_a_thread_follows_the_run(run, index):
    index.start()
    try:
        wait_for(lambda: index.state()["responses"] == 18)
        write_step(path_of(run, 4), random_step(4))
        wait_for(lambda: index.state()["responses"] == 34)
    finally:
        index.stop()


def test_an_error_that_nobody_expected_is_said_and_the_thread_goes_on(run, index, monkeypatch):
    def fail(*_):
        raise AssertionError("an odd record")

    monkeypatch.setattr(index_module, "FOLLOW_SECONDS", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(index_module, "rows_of", fail)
        index.start()
        wait_for(lambda: "an odd record" in index.problem)
    wait_for(lambda: index.state()["responses"] == 18 and not index.problem)
    index.stop()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_index_that_is_deleted_while_it_is_used_comes_back(run, index, monkeypatch, what):
    monkeypatch.setattr(index_module, "FOLLOW_SECONDS", 0.01)
    index.start()
    wait_for(lambda: index.state()["responses"] == 18)
    if what == "folder":
        # at once: rmtree fails if the index writes a file meanwhile
        gone = index.file.parent.rename(index.file.parent.with_name("gone"))
        shutil.rmtree(gone, ignore_errors=True)
    else:
        index.file.unlink()

    def is_back() -> bool:
        try:
            return index.state()["responses"] == 18
        except sqlite3.OperationalError:
            return False

    wait_for(is_back)
    index.stop()


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_without_records_has_an_empty_index(tmp_path):
    (tmp_path / "old").mkdir()
    index = RunIndex(tmp_path / "old", tmp_path / "cache")
    assert index.refresh() == 0
    assert index.state() | {"problem": ""} == {
        "files": 0, "indexed": 0, "responses": 0, "damaged": [], "problem": ""
    }  # fmt: skip


def test_where_the_cache_cannot_be_written_the_index_lies_in_a_temporary_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    index = RunIndex(run, tmp_path / "file" / "cache")
    folder = index.file.parent
    assert index.refresh() == 3 and folder.is_dir()
    index.stop()
    assert not folder.exists()


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "megatron-vespo" / "view"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says: ignore it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "megatron-vespo" / "view"


def test_the_same_size_and_a_new_time_is_a_change(run, index):
    index.refresh()
    stat = path_of(run, 1).stat()
    os.utime(path_of(run, 1), ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert index.refresh() == 1
