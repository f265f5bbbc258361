"""Training runs over two nodes of a real SLURM, as slurm/train.sbatch starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from jobs import Job

from megatron_vespo.observability.metrics import read_metrics
from tests.integration.interrupted import MINI_BATCHES, command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 12
LONG_S = 900.0


def train(slurm: Cluster, model: Path, folder: Path, *flags: str, **variables: str) -> Job:
    """The run of the tests of interrupted runs, shorter, on two nodes."""
    all_flags = command(model, folder, "--train-iters", str(STEPS), *flags)
    return Job(slurm, folder, "train.sbatch", *all_flags[all_flags.index("train") + 1 :], **variables)


def steps(folder: Path) -> list[int]:
    return [r["step"] for r in read_metrics(folder / "out/metrics.jsonl") if "train/loss" in r]


@pytest.fixture(scope="module")
def uninterrupted(slurm, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = train(slurm, tiny_model, folder)
    assert job.wait(LONG_S)["JobState"] == "COMPLETED", job.logs()
    assert job.nothing_left()
    return folder


def test_trainer_and_engine_are_on_different_nodes(slurm, uninterrupted):
    assert steps(uninterrupted) == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
    print(sorted(uninterrupted.rglob("*.log")))
