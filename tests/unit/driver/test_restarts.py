"""Where a run goes on whose trainer has died."""

import os

import pytest

from megatron_vespo.checkpoints.names import TRACKER_NAME
from megatron_vespo.cluster.calls import TrainerError
from megatron_vespo.driver.run import Restarts
from tests.support.settings import flat_settings

ERROR = TrainerError("trainer rank 1 died in train_step: killed\nend of its log: ...")
ERROR.died = True


def save(folder, iteration: int, when: int = 0) -> None:
    (folder / f"iter_{iteration:07d}").mkdir(parents=True, exist_ok=True)
    (folder / TRACKER_NAME).write_text(str(iteration))
    os.utime(folder / TRACKER_NAME, ns=(when, when))


@pytest.fixture()
def args(tmp_path) -> flat_settings:
    return flat_settings(save=str(tmp_path / "saved"), load=None, ckpt_step=None, trainer_restarts=2)


def test_without_a_checkpoint_it_begins_again_so_often(args):
    restarts = Restarts(args)
    for left in (1, 0):
        again, message = restarts.next(ERROR)
        assert again.save.load is None
        assert message == (
            f"RESTART OF THE TRAINER from the beginning, there is no checkpoint yet ({left} more without a "
            "new checkpoint): trainer rank 1 died in train_step: killed"
        )
    with pytest.raises(TrainerError, match="rank 1 died"):
        restarts.next(ERROR)


def test_a_new_checkpoint_is_where_it_goes_on_and_counts_anew(args, tmp_path):
    restarts = Restarts(args)
    for iteration in (4, 8):
        save(tmp_path / "saved", iteration)
        for _ in range(2):
            again, message = restarts.next(ERROR)
            assert again.save.load == args.save.save
            assert f"from {args.save.save}/iter_{iteration:07d} " in message
    with pytest.raises(TrainerError):
        restarts.next(ERROR)
    assert args.save.load is None  # the caller's own


def test_a_checkpoint_of_another_run_is_none_of_this_one(args, tmp_path):
    save(tmp_path / "saved", 40)
    restarts = Restarts(args)
    assert restarts.next(ERROR)[0].save.load is None
    save(tmp_path / "saved", 40, when=1)  # this run's, of the same name
    assert restarts.next(ERROR)[0].save.load == args.save.save


def test_before_its_first_checkpoint_a_resumed_run_goes_on_from_where_it_was_loaded(args, tmp_path):
    args.save.load = str(tmp_path / "other")
    save(tmp_path / "other", 12)
    again, message = Restarts(args).next(ERROR)
    assert again.save.load == args.save.load and "other/iter_0000012" in message


def test_no_restarts_at_all_without_any_allowed(args):
    args.save.trainer_restarts, args.save.save = 0, None
    with pytest.raises(TrainerError):
        Restarts(args).next(ERROR)


def test_what_fails_in_the_same_way_again_is_not_repeated(args, tmp_path):
    """No death: the trainer itself raises, and would once more."""
    restarts = Restarts(args)
    first, second = (TrainerError(f"trainer rank 0 failed in train_step: no {i}\n...") for i in range(2))
    restarts.next(first)
    restarts.next(second)
    save(tmp_path / "saved", 4)
    with pytest.raises(TrainerError, match="no 1"):
        restarts.next(second)


def test_a_run_that_has_gone_back_does_so_again_only_until_it_has_saved(args, tmp_path):
    args.save.load, args.save.ckpt_step = args.save.save, 8
    save(tmp_path / "saved", 16)
    restarts = Restarts(args)
    again, message = restarts.next(ERROR)
    assert (again.save.load, again.save.ckpt_step) == (args.save.save, 8) and "saved/iter_0000008 " in message
    save(tmp_path / "saved", 8, when=1)  # the first save has begun: it has set the others aside
    save(tmp_path / "saved", 12, when=2)
    again, message = restarts.next(ERROR)
    assert (again.save.load, again.save.ckpt_step) == (
        args.save.save,
        None,
    ) and "saved/iter_0000012 " in message


def test_before_the_first_save_elsewhere_is_complete_it_goes_back_again(args, tmp_path):
    args.save.load, args.save.ckpt_step = str(tmp_path / "other"), 8
    save(tmp_path / "saved", 40)
    restarts = Restarts(args)
    (tmp_path / "saved" / TRACKER_NAME).unlink()  # as what was there has been set aside
    again, _ = restarts.next(ERROR)
    assert (again.save.load, again.save.ckpt_step) == (args.save.load, 8)
