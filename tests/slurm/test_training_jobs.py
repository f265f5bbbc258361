"""Training runs on two nodes of a real SLURM, as slurm/train.sbatch starts them: the same numbers."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_vespo.observability.metrics import read_metrics
from tests.support.interrupted import MINI_BATCHES, command, curve
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import ROOT, Job, two_kinds

pytestmark = pytest.mark.timeout(1800)
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


@dataclass(frozen=True)
class Finished:
    job: Job
    trainer: set[str]  # the nodes it was on
    engine: set[str]
    state: dict[str, str]


@pytest.fixture(scope="module")
def finished(slurm, tiny_model, tmp_path_factory) -> Finished:
    job = train(slurm, tiny_model, tmp_path_factory.mktemp("uninterrupted"))
    job.wait_for_output(f" 4/{STEPS} ", LONG_S)
    trainer, engine = nodes_of(job, "TrainerWorker"), nodes_of(job, "EngineActor")
    return Finished(job, trainer, engine, job.wait(LONG_S))


@pytest.fixture(scope="module")
def uninterrupted(finished) -> list[dict]:
    return curve(finished.job.folder)


def test_a_run_on_two_nodes(finished):
    """Ray spreads trainer and engine over both."""
    job = finished.job
    assert (finished.state["JobState"], finished.state["NodeList"]) == ("COMPLETED", "n[1-2]"), job.logs()
    print(f"trainer on {finished.trainer}, engine on {finished.engine}")
    assert finished.trainer and finished.engine and finished.trainer | finished.engine == {"n1", "n2"}
    steps = [r["step"] for r in read_metrics(job.folder / "out/metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
    assert job.nothing_left()


@pytest.mark.slow
def test_a_run_near_its_limit_is_saved_queued_again_and_ends_as_it_would_have(
    slurm, tiny_model, tmp_path, uninterrupted
):
    job = train(slurm, tiny_model, tmp_path)
    job.wait_for_output(f" 6/{STEPS} ", LONG_S)
    job.ask_to_save()
    job.check_end(LONG_S, JobState="COMPLETED", Restarts="1")
    [step] = re.findall(r"ended by SIGUSR1 at optimizer step (\d+), which is saved: ", job.output)
    assert f"resumed at optimizer step {step}," in job.output
    assert curve(tmp_path) == uninterrupted
    assert job.nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_run_that_loses_a_node_goes_on_with_another(slurm, tiny_model, tmp_path, uninterrupted, node):
    """n1 has the job's script, the run's own process and Ray's head; the trainer may be on either."""
    job = train(slurm, tiny_model, tmp_path)
    job.wait_for_output(f" 6/{STEPS} ", LONG_S)
    slurm.kill_node(node)
    state = job.check_end(LONG_S, JobState="COMPLETED", Restarts="1")
    assert state["NodeList"] == {"n2": "n[1,3]", "n1": "n[2-3]"}[node]
    # 4 where the trainer is lost; the engine alone leaves time to save step 6
    assert re.search("resumed at optimizer step [46],", job.output)
    assert curve(tmp_path) == uninterrupted
    assert job.nothing_left()


@pytest.mark.slow
def test_a_mistake_fails_the_job(slurm, tiny_model, tmp_path):
    job = train(slurm, tiny_model, tmp_path, "--lr", "-1", "--group-size", "1")
    job.check_end(LONG_S, JobState="FAILED", ExitCode="2:0", Restarts="0")
    assert "--group-size 1: --advantage-estimator group-mean compares" in job.output
    assert job.nothing_left()


@pytest.mark.slow
def test_trainer_and_engine_on_nodes_of_their_own(slurm, tiny_model, tmp_path, uninterrupted):
    """The trainer has the second node, and with it Ray's head."""
    words = command(tiny_model, tmp_path, "--train-iters", str(STEPS))
    flags, options = words[words.index("train") + 1 :], two_kinds("n2", "n1")
    job = Job(slurm, tmp_path, "train.sbatch", *flags, options=options)
    job.wait_for_output(f" 4/{STEPS} ", LONG_S)
    assert (nodes_of(job, "TrainerWorker"), nodes_of(job, "EngineActor")) == ({"n2"}, {"n1"})
    job.check_end(LONG_S, JobState="COMPLETED")
    assert curve(tmp_path) == uninterrupted
    assert job.nothing_left()


@pytest.mark.slow
def test_the_doctor_on_two_nodes(slurm, tmp_path):
    """srun starts it on both; each checks itself, then they meet."""
    report = tmp_path / "findings.json"
    flags = ["--shared-dir", str(tmp_path), "--json", str(report)]
    doctor = [sys.executable, "-m", "megatron_vespo", "doctor", *flags]
    environment = slurm.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    step = ["srun", "--nodes=2", "--ntasks=2", "--mem=0", "--exclusive"]
    told = slurm.call(*step, *doctor, check=False, cwd=ROOT, env=environment, timeout=LONG_S)
    print(told)
    status = {line["check"]: line["status"] for line in json.loads(report.read_text())["lines"]}
    assert status["processes"] == status["clock"] == status["shared folder"] == "ok", told
    assert status["gloo all-reduce"] == status["megatron-core"] == status["sglang"] == "ok", told
