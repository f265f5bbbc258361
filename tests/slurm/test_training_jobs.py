"""Training runs on two nodes of a real SLURM, as slurm/train.sbatch starts them: the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from cluster import Cluster
from jobs import Job, two_kinds

from megatron_vespo.observability.metrics import read_metrics
from tests.integration.interrupted import MINI_BATCHES, command, curve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 12
LONG_S = 900.0


def train(slurm: Cluster, model: Path, folder: Path, *flags: str) -> Job:
    """The run of the tests of interrupted runs, shorter."""
    words = command(model, folder, "--train-iters", str(STEPS), *flags)
    return Job(slurm, folder, "train.sbatch", *words[words.index("train") + 1 :])


def nodes_of(job: Job, actor: str) -> set[str]:
    """Where the Ray actors of a class are."""
    found = set()
    for process in job.survivors():
        try:
            if f"ray::{actor}" in " ".join(process.cmdline()):
                found.add(process.environ()["SLURMD_NODENAME"])
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def uninterrupted(slurm, tiny_model, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = train(slurm, tiny_model, folder)
    job.wait_for_output(f" 4/{STEPS} ", LONG_S)
    trainer, engine = nodes_of(job, "TrainerWorker"), nodes_of(job, "EngineWorker")
    print(f"trainer on {trainer}, engine on {engine}")
    assert trainer and engine and trainer | engine == {"n1", "n2"}
    assert job.wait(LONG_S)["JobState"] == "COMPLETED", job.logs()
    assert job.nothing_left()
    steps = [r["step"] for r in read_metrics(folder / "out/metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
    return curve(folder)


def test_a_run_near_its_limit_is_saved_queued_again_and_ends_as_it_would_have(
    slurm, tiny_model, tmp_path, uninterrupted
):
    job = train(slurm, tiny_model, tmp_path)
    job.wait_for_output(f" 6/{STEPS} ", LONG_S)
    job.ask_to_save()
    state = job.wait(LONG_S)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), job.logs()
    [step] = re.findall(r"ended by SIGUSR1 at optimizer step (\d+), which is saved: ", job.output)
    assert f"resumed at optimizer step {step}," in job.output
    assert curve(tmp_path) == uninterrupted
    assert job.nothing_left()


def test_a_run_that_loses_a_node_goes_on_with_another(slurm, tiny_model, tmp_path, uninterrupted):
    job = train(slurm, tiny_model, tmp_path)
    job.wait_for_output(f" 6/{STEPS} ", LONG_S)
    slurm.kill_node("n2")
    state = job.wait(LONG_S)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), job.logs()
    assert state["NodeList"] == "n[1,3]"
    # 4 where the trainer is lost; the engine alone leaves time to save step 6
    assert re.search("resumed at optimizer step [46],", job.output)
    assert curve(tmp_path) == uninterrupted
    assert job.nothing_left()


def test_a_mistake_fails_the_job(slurm, tiny_model, tmp_path):
    job = train(slurm, tiny_model, tmp_path, "--lr", "-1", "--num-completions", "1")
    state = job.wait(LONG_S)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), job.logs()
    assert "--num-completions 1: a group needs at least 2" in job.output
    assert job.nothing_left()


def test_trainer_and_engine_on_nodes_of_their_own(slurm, tiny_model, tmp_path, uninterrupted):
    """The trainer has the second node, and with it Ray's head."""
    words = command(tiny_model, tmp_path, "--train-iters", str(STEPS))
    flags, options = words[words.index("train") + 1 :], two_kinds("n2", "n1")
    job = Job(slurm, tmp_path, "train.sbatch", *flags, options=options)
    job.wait_for_output(f" 4/{STEPS} ", LONG_S)
    assert (nodes_of(job, "TrainerWorker"), nodes_of(job, "EngineWorker")) == ({"n2"}, {"n1"})
    assert job.wait(LONG_S)["JobState"] == "COMPLETED", job.logs()
    assert curve(tmp_path) == uninterrupted
    assert job.nothing_left()
