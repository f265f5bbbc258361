"""What the group sends to each rank of a rollout batch; the ranks are stand-ins, Ray's store is a list."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vespo.cluster import trainer_group
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.packing import PackingRule, SequenceWork
from megatron_vespo.data.shards import MiniBatchOutline, Shard
from tests.support.builders import make_sample
from tests.support.settings import flat_settings

NUM_DATA_RANKS = 2
RULE = PackingRule(SequenceWork(1.0, 0.0), NUM_DATA_RANKS, 64, TokenLayout())
STORE = 5_000  # bytes
DATA_RANKS = [0, 0, 1, 1]  # of four trainer ranks: two tensor-parallel ranks each


class Rank:
    def __init__(self):
        self.calls: list[tuple] = []
        self.traced = SimpleNamespace(remote=lambda *call: self.calls.append(call) or (None, [], []))


@pytest.fixture()
def stored() -> list:
    return []


@pytest.fixture()
def group(monkeypatch, stored) -> TrainerGroup:
    def put(value):
        stored.append(value)
        return value

    monkeypatch.setattr(trainer_group, "gather", lambda refs, *others: refs)
    monkeypatch.setattr(trainer_group.ray, "put", put)
    group = TrainerGroup(flat_settings(train_timeout=1.0), SimpleNamespace(trainer=[]), None, lambda: None)
    monkeypatch.setattr(trainer_group, "object_store_bytes", lambda: STORE)
    group._workers, group.told = [Rank() for _ in DATA_RANKS], []
    group._log = group.told.append
    group._rule, group._data_ranks = RULE, DATA_RANKS
    return group


def mini_batches() -> list:
    draw = np.random.default_rng(0)
    return [
        [make_sample(3, int(length), advantage=number) for length in draw.integers(1, 40, 16)]
        for number in range(3)
    ]


def test_each_rank_gets_its_samples_and_a_few_numbers_of_the_others(group, stored):
    batches = mini_batches()
    group.prepare(batches)
    assert len(stored) == len(batches) * (1 + NUM_DATA_RANKS), "one object per mini-batch and data rank"
    for worker, data_rank in zip(group._workers, DATA_RANKS, strict=True):
        *takes, prepare = worker.calls
        for index, (call, batch) in enumerate(zip(takes, batches, strict=True)):
            method, number, outline, shard, replay = call
            assert (method, number, replay) == ("take", index, True)
            cut = MiniBatchOutline.of(batch, RULE).cut
            assert outline.cut == cut and len(outline.samples) == len(batch)
            expected = {i: batch[i] for i in cut.of_rank(data_rank)}
            found = shard.samples()
            assert list(found) == list(expected)
            for i, sample in expected.items():
                np.testing.assert_array_equal(found[i].token_ids, sample.token_ids, strict=True)
        assert prepare[0] == "prepare" and [sample.advantage for sample in prepare[1]] == [2.0] * 8
    for first, second in ((0, 1), (2, 3)):
        for one, other in zip(group._workers[first].calls, group._workers[second].calls, strict=True):
            of_samples = 3 if one[0] == "take" else -1
            assert one[of_samples] is other[of_samples], "tensor-parallel ranks share the object"


def test_bytes_for_a_rank_shrink_with_the_number_of_data_parallel_ranks(group, stored):
    batches = mini_batches()
    group.prepare(batches)
    columns = sum(4 * s.prompt_length + 8 * s.completion_length for batch in batches for s in batch)
    shards = [value for value in stored if isinstance(value, Shard)]
    assert sum(shard.nbytes for shard in shards) == columns
    for worker in group._workers:
        received = sum(call[3].nbytes for call in worker.calls[:-1])
        assert 0.9 * columns / NUM_DATA_RANKS < received < 1.1 * columns / NUM_DATA_RANKS
    outlines = [len(pickle.dumps(value)) for value in stored if isinstance(value, MiniBatchOutline)]
    assert max(outlines) < 100 * len(batches[0]) + 1000


def test_samples_travel_to_the_reference_without_their_routes(group, stored):
    """Those of recorded batches are in this process, and are most of a sample's bytes."""
    batch = [make_sample(3, 20, routed_experts=np.zeros((22, 4, 8), np.uint8)) for _ in range(16)]
    group.reference_log_probs([batch])
    columns = sum(4 * sample.prompt_length + 8 * sample.completion_length for sample in batch)
    assert sum(value.nbytes for value in stored if isinstance(value, Shard)) == columns
    assert all(sample.routed_experts is not None for sample in batch)


def test_a_batch_that_cannot_be_cut_reaches_no_rank(group):
    with pytest.raises(ValueError, match=r"^sample 1 \(group 0\) has 74 tokens, more than --max-tokens"):
        group.prepare([[make_sample(), make_sample(4, 70)]])
    assert all(worker.calls == [] for worker in group._workers)


def test_a_mini_batch_beyond_the_object_store_is_told_once(group):
    small, large = ([make_sample(3, length) for _ in range(16)] for length in (30, 60))
    group.prepare([small, small])
    assert group.told == [], "4,032 bytes each, one after another"
    group.prepare([large, large])
    [line] = group.told
    assert line.startswith("a mini-batch has 0.00 GB, Ray's object store on the driver's node 0.00 GB: Ray ")
