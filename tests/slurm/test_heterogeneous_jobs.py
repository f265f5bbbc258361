"""Jobs of two components on a real SLURM: the trainer's nodes and the engines', with one Ray and one end."""

from __future__ import annotations

import pytest

from tests.support.slurm_jobs import (
    TWO_KINDS,
    UNTIL_ASKED,
    WAIT_S,
    Job,
    SubmittedJob,
    recipe,
    stub_venv,
    two_kinds,
)


def rays_of(job: Job, attempt: str = "") -> dict[str, str]:
    """Node -> what its Ray was started with."""
    files = job.folder.glob(f"slurm-logs/*/attempt-{attempt}-*")
    return {file.name.split("-")[-1]: file.read_text() for file in files}


def test_trainer_and_engines_have_nodes_of_their_own(job):
    asked = job(UNTIL_ASKED, "--lr", "1e-6", options=two_kinds("n2", "n1"))
    asked.wait_for_output("running on", WAIT_S)
    asked.ask_to_save()
    asked.check_end(JobState="COMPLETED", Restarts="1")
    for attempt in ("1", "2"):
        assert f"attempt {attempt}: 2 nodes (n2 for the trainer, n1 for engines)" in asked.output
    for rays in (rays_of(asked), rays_of(asked, "1")):
        assert rays.keys() == {"n1", "n2"}
        assert "--head" in rays["n2"] and '--resources={"vespo_trainer":1}' in rays["n2"]
        assert "--head" not in rays["n1"] and '--resources={"vespo_engine":1}' in rays["n1"]
    assert f"running on n2: train --lr 1e-6 --ray-address {asked.slurm.address('n2')}:" in asked.output
    assert asked.output.count("asked 1\n") == 1 and "resumed" in asked.output


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "engines", "head"), [("n3", "n[1-2]", "n3"), ("n[2-3]", "n1", "n2")])
def test_components_of_several_nodes(job, trainer, engines, head):
    failed = job('echo "on $SLURMD_NODENAME"; exit 3', options=two_kinds(trainer, engines))
    failed.check_end(ExitCode="3:0")
    assert "exit code 3, all nodes answer: not started again" in failed.output
    rays = rays_of(failed)
    assert f"on {head}\n" in failed.output and [n for n in rays if "--head" in rays[n]] == [head]
    assert {n for n in rays if "vespo_engine" in rays[n]} == ({"n1", "n2"} if "[" in engines else {"n1"})


@pytest.mark.slow
def test_a_node_of_a_component_is_lost_and_both_go_on(job):
    lost = job(UNTIL_ASKED, options=TWO_KINDS)
    lost.wait_for_output("running on n1", WAIT_S)
    lost.slurm.kill_node("n2")
    lost.check_end(JobState="COMPLETED", Restarts="1")
    assert "attempt 2: 2 nodes (n1 for the trainer, n3 for engines)" in lost.output


@pytest.mark.slow
def test_three_components_are_one_too_many(job):
    failed = job("echo never", options=[*two_kinds("n1", "n2"), ":", "--nodes=1"])
    failed.check_end(ExitCode="1:0")
    assert "a job of 3 components: must be two, the trainer's and the engines'" in failed.output


@pytest.mark.slow
def test_it_is_submitted(slurm, tmp_path):
    flags = f"--hf-checkpoint {tmp_path} --prompt-data d --output-dir o --save c --load c --lr 1e-6"
    words = [str(recipe(tmp_path / "two_kinds.flags", flags)), "--nodes", "2", "--engine-nodes", "1"]
    venv = stub_venv(tmp_path / "venv", 'echo "$SLURM_JOB_NAME on $SLURMD_NODENAME: $*"')
    words += ["--engine-sbatch", "nodelist=n1", "--venv", venv]
    words += "--gpu other --train-iters 8 --lr 1".split()
    job = SubmittedJob(slurm, tmp_path / "job", *words)
    job.check_end(JobState="COMPLETED")
    assert "3 nodes (n[2-3] for the trainer, n1 for engines)" in job.output
    assert "two_kinds on n2: train --hf-checkpoint" in job.output
    assert all("--num-cpus=2" in told for told in rays_of(job).values())  # whole nodes, of both components
