"""pi_old from other weights than those in place: bit for bit what a policy with those weights says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.micro_batch import build_micro_batch
from megatron_vespo.types import VersionSpans
from tests.support.builders import make_sample, make_segments
from tests.support.random_task import VOCAB_SIZE

LAYOUTS = {
    "one rank": (1, ""),
    "one rank, bf16": (1, "--bf16"),
    "cp2": (2, "--context-parallel-size 2"),
    "dp2, overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                   "--expert-tensor-parallel-size 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(on_task):
    def start(layout: str, *flags: str):
        num_ranks, layout_flags = LAYOUTS[layout]
        return on_task("old_policy.py", num_ranks, *layout_flags.split(), *flags)

    return start


def check(results):
    """pi_old's log-probs, which the ranks have in parts, and that no weight has moved."""
    for result in results:
        assert result["restored"] and result["restored after an exception"]
        # what is swapped in reaches every layer: without any weight all tokens are equally likely
        np.testing.assert_allclose(result["swapped"], -np.log(VOCAB_SIZE), rtol=1e-5)
        held = ~np.isnan(result["actual"])
        np.testing.assert_array_equal(result["actual"][held], result["expected"][held])
        assert np.abs(result["expected"] - result["now"]).max() > 0.01
    assert np.any([~np.isnan(result["actual"]) for result in results], axis=0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_snapshots(run, layout):
    results = run(layout, "--old-policy", "snapshot", "--old-policy-snapshots", "3")
    check(results)
    for result in results:
        assert result["restored after a refusal"]
        assert result["gone"] == (
            "sample 23 (group 5) has tokens of policy version 0, snapshots are kept of versions 1 to 3: "
            "raise --old-policy-snapshots 3 or train on younger samples"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_average(run, layout):
    results = run(layout, "--old-policy", "ewma", "--ewma-decay", "0.7")
    check(results)
    # the average is float32, in the model it has the model's precision
    assert max(result["weights"] for result in results) < (4e-3 if "bf16" in layout else 1e-6)


class Chunk(torch.nn.Linear):
    """A model chunk of one weight."""

    bucket_groups: list = []
    expert_parallel_bucket_groups: list = []

    def __init__(self, value: float, dtype=torch.float32):
        super().__init__(1, 1, bias=False, dtype=dtype)
        self.set(value)

    def set(self, value: float) -> None:
        self.weight.data.fill_(value)


def sample(*versions: int):
    return SimpleNamespace(policy_versions=VersionSpans.of(versions), num_trained=len(versions), group_id=7)


@pytest.fixture(scope="module")
def old_policy():
    from megatron_vespo.trainer import old_policy

    return old_policy


def test_each_version_has_its_weights_and_the_newest_come_back(old_policy):
    chunk = Chunk(5.0)
    kept = old_policy.Snapshots([chunk], 3, version=5, complete=lambda: None)
    for version in (6, 7, 8):
        chunk.set(float(version))
        kept.advance(version)
    assert kept.versions([sample(6, 6, 8), sample(8), sample(7, 8)]) == [6, 7, 8]
    for version in (6, 8, 7):
        with kept.weights(version):
            assert chunk.weight.item() == version
        assert chunk.weight.item() == 8.0


def test_a_version_runs_the_packs_that_hold_it_on_any_rank():
    from megatron_vespo.trainer.mini_batch import Versions

    versions = Versions((), [{6}, {6, 7}, {8}, {7}], pack_multiple=1)
    assert [versions.packs_of(version) for version in (6, 7, 8)] == [[0, 1], [1, 3], [2]]
    in_pairs = Versions((), [{6}, {6, 7}, {8}, {7}], pack_multiple=2)
    assert [in_pairs.packs_of(version) for version in (6, 7, 8)] == [[0, 1], [1, 3], [2, 0]]


@pytest.mark.parametrize("context", [1, 2])
def test_versions_are_those_of_the_sampled_tokens(context):
    from megatron_vespo.trainer.mini_batch import Versions

    samples = [
        make_sample(2, 5, segments=make_segments(1, 2, 2), policy_versions=VersionSpans((6, 7), (2, 1))),
        make_sample(1, 3, policy_versions=VersionSpans((8, 9), (1, 2))),
    ]
    versions = Versions(samples, [], pack_multiple=1)
    found = []
    for rank in range(context):
        layout = TokenLayout(context, rank)
        length = layout.padded_pack(sum(layout.padded_length(s.num_tokens) for s in samples))
        pack = build_micro_batch(samples, [1, 0], length, layout)
        rows = (
            pack.sequence_ids_T[pack.loss_positions],
            pack.labels_T[pack.loss_positions],
            versions.of(pack),
        )
        found += zip(*(row.tolist() for row in rows), strict=True)
    # tokens are numbered: (sequence of the pack, token, its version)
    assert sorted(found) == [(0, 1, 8), (0, 2, 9), (0, 3, 9), (1, 2, 6), (1, 5, 6), (1, 6, 7)]


@pytest.mark.parametrize("version", [5, 9])
def test_a_version_that_is_not_kept(old_policy, version):
    kept = old_policy.Snapshots([Chunk(0.0)], 2, version=6, complete=lambda: None)
    kept.advance(7)
    kept.advance(8)
    with pytest.raises(ValueError) as error:
        kept.versions([sample(8), sample(8, version)])
    assert str(error.value) == (
        f"sample 1 (group 7) has tokens of policy version {version}, snapshots are kept of versions 7 to 8: "
        "raise --old-policy-snapshots 2 or train on younger samples"
    )


def test_versions_that_are_missing(old_policy):
    kept = old_policy.Snapshots([Chunk(0.0)], 2, version=0, complete=lambda: None)
    short = sample(0, 0)
    short.num_trained = 3
    with pytest.raises(ValueError, match="has 2 policy_versions for 3 sampled tokens"):
        kept.versions([short])


def test_a_resumed_run_begins_anew_from_the_weights_it_loaded(old_policy, monkeypatch):
    """Nothing of the run before is known: no average of its weights, no snapshot of its versions."""
    monkeypatch.setattr(old_policy.dist, "get_rank", lambda: 1)

    def run(settings: LossSettings, version: int, weights: list[float]):
        """A process that has loaded the first of these weights and made steps to the others."""
        chunk = Chunk(weights[0])
        pi_old = old_policy.old_policy(settings, [chunk], version, complete=lambda: None)
        for step, value in enumerate(weights[1:], start=1):
            chunk.set(value)
            pi_old.advance(version + step)
        return pi_old, chunk

    for weights, average in (([1.0, 2.0], (0.9 * 1.0 + 2.0) / 1.9), ([2.0], 2.0)):  # the second resumes
        pi_old, chunk = run(LossSettings(old_policy="ewma", ewma_decay=0.9), 7, weights)
        with pi_old.weights():
            assert chunk.weight.item() == pytest.approx(average, rel=1e-6)
    resumed, chunk = run(LossSettings(old_policy="snapshot"), 7, [2.0])
    with resumed.weights(*resumed.versions([sample(7)])):
        assert chunk.weight.item() == 2.0
    with pytest.raises(ValueError, match="policy version 6, snapshots are kept of versions 7 to 7"):
        resumed.versions([sample(6)])


def test_a_bfloat16_average_does_not_stand_still(old_policy):
    """Ten steps of a thousandth each: in bfloat16 the average would round every one of them away."""
    chunk = Chunk(1.0, torch.bfloat16)
    average = old_policy.MovingAverage([chunk], 0.99, complete=lambda: None)
    chunk.set(1.0078125)  # the next bfloat16
    for step in range(10):
        average.advance(step)
    expected = 1.0 + 0.0078125 * sum(0.99**i for i in range(10)) / sum(0.99**i for i in range(11))
    assert average._average[0].item() == pytest.approx(expected, abs=1e-7)
