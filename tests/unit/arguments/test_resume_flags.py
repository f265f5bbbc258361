"""--load and --ckpt-step: what they name, what is refused, and that a requeued job goes on."""

from argparse import Namespace

import pytest

from megatron_vespo.arguments.resume import describe, how_to_go_on, resolve_load, resumed_folder
from megatron_vespo.checkpoints.names import COMPLETE_NAME, TRACKER_NAME
from megatron_vespo.checkpoints.set_aside import RECORD, make_room

GIVEN = {"lr": 1e-6, "load": "saved", "ckpt_step": 8, "ray_address": "10.0.0.1:6379"}


@pytest.fixture()
def saved(tmp_path):
    folder = tmp_path / "saved"
    save(folder, 4, 8, 16)
    return folder


def save(folder, *steps: int) -> None:
    for step in steps:
        (folder / f"iter_{step:07d}").mkdir(parents=True)
        (folder / f"iter_{step:07d}" / COMPLETE_NAME).touch()
    (folder / TRACKER_NAME).write_text(str(steps[-1]))


def resolved(load, save=None, step=None, given=GIVEN) -> Namespace:
    paths = {"load": load and str(load), "save": save and str(save)}
    args = Namespace(**paths, ckpt_step=step, sglang_flags=["--dtype", "float32"])
    resolve_load(args, given)
    return args


def refused(*arguments, **named) -> str:
    with pytest.raises(ValueError) as error:
        resolved(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_both_spellings_are_one(saved):
    one, other = resolved(saved, step=8), resolved(saved / "iter_0000008")
    assert vars(one) == vars(other)
    assert (one.load, one.ckpt_step) == (str(saved), 8)
    assert resumed_folder(one) == saved / "iter_0000008"
    assert resolved(saved / "iter_0000008/", step=8).ckpt_step == 8


def test_without_a_step_it_is_the_newest(saved):
    args = resolved(saved)
    assert args.ckpt_step is None and args.gone_back is None
    assert resumed_folder(args) == saved / "iter_0000016"
    assert resumed_folder(resolved(None)) is None


def test_paths_are_absolute(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    args = resolved("saved/iter_0000008", "saved/")
    assert args.load == args.save == str(saved)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(saved, tmp_path):
    (saved / "iter_0000012").mkdir()  # not complete
    for load, step in ((saved, 12), (saved / "iter_0000012", None)):
        message = f"--ckpt-step 12: no checkpoint of that step in {saved}, there are 4, 8, 16"
        assert refused(load, step=step) == message
    empty = tmp_path / "empty"
    # the same folder for both: to go on or begin, but this is neither
    assert refused(empty, empty, 8) == f"--ckpt-step 8: no checkpoint of that step in {empty}, there is none"


def test_contradictions_are_refused(saved):
    assert refused(None, step=8) == "--ckpt-step 8 needs --load, the folder of its checkpoint"
    assert refused(saved / "iter_0000008", step=4) == (
        f"--load {saved}/iter_0000008 is of step 8, --ckpt-step is 4: leave one out"
    )


def test_a_folder_without_checkpoints_is_refused_unless_the_run_saves_there(tmp_path):
    nowhere = tmp_path / "nowhere"
    assert refused(nowhere, tmp_path / "elsewhere") == (
        f"--load {nowhere}: no checkpoint there (latest_checkpointed_iteration.txt is missing)"
    )
    assert resumed_folder(resolved(nowhere, nowhere)) is None


def test_plan_reads_a_recipe_whose_checkpoint_is_not_there_yet():
    assert resolved("", step=8).ckpt_step is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_same_command_goes_on_once_it_has_saved(saved, tmp_path, elsewhere):
    target = tmp_path / "new" if elsewhere else saved
    args = resolved(saved, target, 8)
    assert args.ckpt_step == 8
    make_room(target, 0 if elsewhere else 8, args.gone_back)  # its first save begins
    if not elsewhere:
        save(target, 12)
    else:
        assert resolved(saved, target, 8).ckpt_step == 8  # killed before it was complete
        save(target, 12)
    again = resolved(saved, target, 8, GIVEN | {"ray_address": "10.0.0.2:6379"})
    assert (again.load, again.ckpt_step) == (str(target), None)
    assert resumed_folder(again) == target / "iter_0000012"
    assert describe(again, 12) == [
        "this command has gone back to optimizer step 8 before and goes on from there; to go back once more "
        f"remove {target / RECORD}"
    ]
    # that checkpoint may be deleted by then; another command goes back anew
    assert resolved(saved, target, 8, GIVEN | {"lr": 5e-7}).ckpt_step == 8
    assert resolved(saved, target, 4).ckpt_step == 4


def test_what_will_move_is_said_before(saved, tmp_path):
    assert describe(resolved(saved, saved), 16) == describe(resolved(saved), 16) == []
    assert describe(resolved(saved, saved, 4), 4) == [
        f"{saved} has checkpoints of other training, optimizer steps 8, 16: the first save moves them to "
        f"{saved}/set-aside-001"
    ]
    assert describe(resolved(saved, tmp_path / "new", 4), 4) == []
    [line] = describe(resolved(None, saved), 0)
    assert "optimizer steps 4, 8, 16" in line


def test_how_to_go_on_names_the_step_that_the_tracker_does_not(saved):
    assert how_to_go_on(resolved(saved, saved), 16) == f"--load {saved}"
    assert how_to_go_on(resolved(saved, saved, 8), 8) == f"--load {saved} --ckpt-step 8"
