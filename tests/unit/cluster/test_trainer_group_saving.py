"""What the group of ranks is asked to save, and what it makes of the reports; the ranks are stand-ins."""

from types import SimpleNamespace

import pytest

from megatron_vespo.checkpoints.run_folder import SaveReport
from megatron_vespo.cluster import trainer_group
from megatron_vespo.cluster.trainer_group import TrainerGroup
from tests.support.settings import flat_settings


class Rank:
    """Answers at once, with the reports that are given."""

    def __init__(self, reports: list[SaveReport]):
        self.calls: list[tuple] = []
        self.traced = SimpleNamespace(remote=lambda *call: self.calls.append(call) or (None, [], reports))


@pytest.fixture()
def group(monkeypatch) -> TrainerGroup:
    monkeypatch.setattr(trainer_group, "gather", lambda refs, *others: refs)
    monkeypatch.setattr(trainer_group.ray, "put", lambda value: ("reference", value))
    nowhere = SimpleNamespace(trainer=[])
    group = TrainerGroup(flat_settings(train_timeout=1.0), nowhere, None, lambda: None, prompts=b"prompts")
    group.told = []
    group._on_save = group.told.append
    return group


def test_buffer_and_prompts_are_sent_to_rank_0_as_arguments_of_their_own(group):
    group._workers = [Rank([]), Rank([]), Rank([])]
    group.save({"iteration": 4}, b"groups")
    assert [worker.calls for worker in group._workers] == [
        [("save", {"iteration": 4}, ("reference", b"groups"), ("reference", b"prompts"))],
        [("save", {"iteration": 4}, None, None)],
        [("save", {"iteration": 4}, None, None)],
    ]
    group.save({"iteration": 8}, None)
    assert group._workers[0].calls[1] == ("save", {"iteration": 8}, None, ("reference", b"prompts"))


def test_a_failed_save_is_told_and_the_last_one_counts_in_the_end(group):
    good, bad = SaveReport(4, 1.0, 10), SaveReport(8, 1.0, 10, "no room")
    group._workers = [Rank([good]), Rank([])]
    group.save({"iteration": 4}, None)
    group.finish_save()
    assert group.saved_iteration == 4
    group._workers = [Rank([bad]), Rank([])]
    group.save({"iteration": 8}, None)  # the run goes on
    assert group.told == [good, good, bad] and group.saved_iteration == 4
    group._workers = [Rank([]), Rank([])]
    group.wait_for_save()
    with pytest.raises(RuntimeError, match="optimizer step 8 could not be saved: no room"):
        group.finish_save()
    group._workers = [Rank([SaveReport(12, 1.0, 10)]), Rank([])]
    group.finish_save()
    assert group.saved_iteration == 12


def test_only_a_save_under_way_is_polled_and_never_during_a_call(group):
    rank = Rank([])
    group._workers = [rank]
    group.poll_save()
    assert rank.calls == []
    # what the save before it has come to is heard first
    group._workers = [Rank([SaveReport(4, 1.0, 10)])]
    group.save({"iteration": 8}, None)
    group._workers = [rank]
    with group._one_call:
        group.poll_save()
    assert rank.calls == []
    group.poll_save()
    assert rank.calls == [("poll_save",)]
    group._workers = [Rank([SaveReport(8, 1.0, 10)])]
    group.poll_save()
    group._workers = [rank]
    group.poll_save()
    assert len(rank.calls) == 1
