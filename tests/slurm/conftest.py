"""A SLURM of three nodes for all tests here, each skipped with the reason where there can be none."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vespo.system.plugins import load_runtime_plugins
from tests.support.servers import make_tiny_model
from tests.support.slurm_cluster import Cluster, why_not
from tests.support.slurm_jobs import Job, stub_venv


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def all_nodes_serve(slurm):
    """What a test has killed is back for the next one, and nothing runs there."""
    yield
    slurm.revive()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    load_runtime_plugins()
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"), seed=0)


@pytest.fixture
def job(slurm, tmp_path):
    """A job of a stub program."""
    jobs = []

    def submit(program: str, *flags: str, script: str = "train.sbatch", options=(), **variables: str) -> Job:
        venv = stub_venv(tmp_path / f"venv{len(jobs)}", program)
        folder = tmp_path / f"job{len(jobs)}"
        jobs.append(Job(slurm, folder, script, *flags, options=options, VESPO_VENV=venv, **variables))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.cancel()
    assert all(job.nothing_left() for job in jobs)
