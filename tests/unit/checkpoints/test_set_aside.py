"""Checkpoints of another line of training make room for a run's own."""

import json

import pytest

from megatron_vespo.checkpoints import set_aside as module
from megatron_vespo.checkpoints.names import COMPLETE_NAME, TRACKER_NAME
from megatron_vespo.checkpoints.run_folder import newest_save, saved_steps
from megatron_vespo.checkpoints.set_aside import (
    RECORD,
    has_gone_back,
    kept_step,
    later_steps,
    make_room,
    set_aside,
)
from tests.support.saved_steps import complete

ASKED = {"load": "/saved", "step": 8, "flags": {"lr": "1e-6"}}


def test_only_the_same_folder_holds_what_a_run_began_with():
    assert kept_step(load="a", save="a", step=8) == 8
    assert kept_step(load="b", save="a", step=8) == 0


def test_later_steps_move_and_the_tracker_names_where_the_run_began(tmp_path):
    complete(tmp_path, 4, 8, 12, 16)
    (tmp_path / "iter_0000020").mkdir()  # a save that was killed: the next one of that step clears it
    assert later_steps(tmp_path, 8) == [12, 16]
    make_room(tmp_path, 8, ASKED)
    assert saved_steps(tmp_path) == [4, 8] and newest_save(tmp_path).name == "iter_0000008"
    aside = tmp_path / "set-aside-001"
    assert saved_steps(aside) == [12, 16] and newest_save(aside) == aside / "iter_0000016"
    assert (aside / "iter_0000012" / COMPLETE_NAME).read_text() == "of step 12"
    assert json.loads((tmp_path / RECORD).read_text()) == ASKED
    complete(tmp_path, 12)
    make_room(tmp_path, 8, ASKED)
    assert saved_steps(tmp_path / "set-aside-002") == [12]


def test_another_runs_folder_is_emptied(tmp_path):
    complete(tmp_path, 4, 40)
    make_room(tmp_path, 0, None)
    assert newest_save(tmp_path) is None and saved_steps(tmp_path) == []
    assert saved_steps(tmp_path / "set-aside-001") == [4, 40]


def test_an_ordinary_resume_moves_nothing(tmp_path):
    complete(tmp_path, 4, 8)
    make_room(tmp_path, 8, None)
    make_room(tmp_path / "new", 0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000004", "iter_0000008", TRACKER_NAME]


def test_a_name_is_not_used_twice(tmp_path):
    for name in ("set-aside-007", "set-aside-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "one").touch()
    assert set_aside(tmp_path, [tmp_path / "one"]) == tmp_path / "set-aside-008"


def test_the_same_going_back_is_known_until_somebody_else_saves(tmp_path):
    assert not has_gone_back(tmp_path, ASKED)
    complete(tmp_path, 8)
    make_room(tmp_path, 8, ASKED)
    assert has_gone_back(tmp_path, ASKED)
    assert not has_gone_back(tmp_path, ASKED | {"step": 4})
    assert not has_gone_back(tmp_path, ASKED | {"flags": {"lr": "5e-7"}})
    complete(tmp_path, 10, 20)
    (tmp_path / TRACKER_NAME).write_text("")  # by a kill
    assert has_gone_back(tmp_path, ASKED)
    make_room(tmp_path, 8, None)
    assert not has_gone_back(tmp_path, ASKED)
    # elsewhere it is known when there is something to go on from
    make_room(tmp_path / "new", 0, ASKED)
    assert not has_gone_back(tmp_path / "new", ASKED)
    complete(tmp_path / "new", 12)
    assert has_gone_back(tmp_path / "new", ASKED)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(6))
def test_killed_anywhere_the_tracker_names_a_checkpoint_and_nothing_is_lost(tmp_path, monkeypatch, calls):
    complete(tmp_path, 4, 8, 12, 16)
    left = [calls]

    def counted(function):
        def call(*arguments, **named):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", counted(module.write_atomically))
        patch.setattr(module.Path, "rename", counted(module.Path.rename))
        try:
            make_room(tmp_path, 8, ASKED)
        except Killed:
            assert not has_gone_back(tmp_path, ASKED)
        else:
            assert calls == 5
    assert (newest_save(tmp_path) / COMPLETE_NAME).is_file()
    make_room(tmp_path, 8, ASKED)  # the command that is started again
    assert saved_steps(tmp_path) == [4, 8] and newest_save(tmp_path).name == "iter_0000008"
    aside = [step for folder in tmp_path.glob("set-aside-*") for step in saved_steps(folder)]
    assert sorted(aside) == [12, 16]
    assert has_gone_back(tmp_path, ASKED) and not list(tmp_path.glob(".*.partial"))
