"""What the scripts of slurm/ do on a real SLURM with a program that does nothing but end in its ways."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.slurm_jobs import (
    ROOT,
    TWO_KINDS,
    UNTIL_ASKED,
    WAIT_S,
    Job,
    PastedJob,
    SubmittedJob,
    recipe,
    stub_venv,
)


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


# of one kind of nodes, and of two
each_kind = pytest.mark.parametrize("kinds", [(), slow(TWO_KINDS)], ids=["one", "two"])


def test_the_program_runs_once_on_the_first_node_and_its_end_is_the_jobs(job):
    program = 'echo "on $SLURMD_NODENAME: $*"; echo "token $RAY_AUTH_TOKEN"'
    done = job(program, "--lr", "1e-6", "--vespo-positive", "2 3")
    done.check_end(JobState="COMPLETED")
    said = re.findall(
        r"on (\S+): train --lr 1e-6 --vespo-positive 2 3 --ray-address (\S+):2\d{4}\n", done.output
    )
    [(node, address)] = said
    assert done.state()["BatchHost"] == node
    assert address == done.slurm.address(node)
    tokens = re.findall("token (.*)", done.output)
    assert len(tokens[0]) == 64
    assert {file.name for file in done.folder.glob("slurm-logs/*/ray-*")} == {"ray-n1.log", "ray-n2.log"}


@pytest.mark.parametrize("code", [1, slow(2), slow(76)])
def test_a_program_that_fails_fails_the_job_with_its_code(job, code):
    failed = job(f"exit {code}")
    failed.check_end(JobState="FAILED", ExitCode=f"{code}:0", Restarts="0")
    assert f"exit code {code}" in failed.output


@pytest.mark.parametrize("script", ["train.sbatch", slow("eval.sbatch")])
def test_a_job_near_its_limit_saves_goes_back_into_the_queue_and_goes_on(job, script):
    asked = job(UNTIL_ASKED, script=script)
    asked.wait_for_output("running on", WAIT_S)
    asked.ask_to_save()
    asked.check_end(JobState="COMPLETED", Restarts="1")
    assert asked.output.count("asked 1\n") == 1 and "asked 2" not in asked.output  # twice means: at once
    assert "all is saved: back into the queue" in asked.output
    command = {"train.sbatch": "train", "eval.sbatch": "evaluate"}[script]
    assert f"running on n1: {command} --ray-address" in asked.output
    assert "attempt 2: 2 nodes" in asked.output and "resumed" in asked.output


@pytest.mark.slow
@each_kind
def test_the_limit_itself(job, kinds):
    """SLURM's signal may come a minute early, and limits are whole minutes."""
    limited = job(UNTIL_ASKED, options=["--time=2", "--signal=B:USR1@50", *kinds])
    limited.check_end(300, JobState="COMPLETED", Restarts="1")
    assert limited.output.count("asked 1\n") == 1


@pytest.mark.slow
def test_not_saved_in_time(job):
    """The checkpoint before counts then."""
    late = job(UNTIL_ASKED.replace("exit 75", "exit 76"))
    late.wait_for_output("running on", WAIT_S)
    late.ask_to_save()
    late.check_end(JobState="COMPLETED", Restarts="1")
    assert "not saved in time, the last checkpoint counts" in late.output


@pytest.mark.slow
def test_no_more_often_than_it_may(job):
    asked = job(UNTIL_ASKED, VESPO_MAX_RESTARTS="1", ATTEMPTS="9")
    for attempt in (1, 2):
        asked.wait_for_output(f"(?s)attempt {attempt}:.*running on", WAIT_S)
        asked.ask_to_save()
        if attempt == 1:
            asked.wait_for_output("back into the queue", WAIT_S)
    asked.check_end(JobState="FAILED", ExitCode="75:0", Restarts="1")
    assert "started again 1 times (VESPO_MAX_RESTARTS), not once more" in asked.output


@each_kind
def test_a_cancelled_job_does_not_come_back(job, kinds):
    cancelled = job(UNTIL_ASKED.replace("USR1", "USR1 TERM"), options=kinds)
    cancelled.wait_for_output("running on", WAIT_S)
    cancelled.cancel()
    assert cancelled.nothing_left()
    cancelled.check_end(JobState="CANCELLED", Restarts="0")


@pytest.mark.slow
def test_a_node_is_lost_and_the_job_goes_on_with_another(job):
    lost = job(UNTIL_ASKED)
    lost.wait_for_output("running on n1", WAIT_S)
    lost.slurm.kill_node("n2")
    state = lost.check_end(JobState="COMPLETED", Restarts="1")
    assert state["NodeList"] == "n[1,3]"
    assert "resumed" in lost.output


@pytest.mark.slow
@each_kind
def test_a_program_that_fails_because_a_node_is_lost_is_started_again(job, kinds):
    """Ray hears of it before SLURM does."""
    program = "if [[ ${SLURM_RESTART_COUNT-} ]]; then echo resumed; else echo go; read -t 20; exit 1; fi"
    failed = job(program, options=kinds or ["--time=10"])
    failed.wait_for_output("go", WAIT_S)
    failed.slurm.kill_node("n2")
    failed.check_end(240, JobState="COMPLETED", Restarts="1")


@pytest.mark.parametrize("node", ["n1", slow("n2")])
def test_a_node_without_ray_ends_the_job(job, node):
    program = "echo never"
    failed = job(program, RAY_FAILS_ON=node, VESPO_START_SECONDS="10")
    failed.check_end(JobState="FAILED", ExitCode="1:0")
    assert "no Ray today" in failed.logs()


@pytest.mark.slow
def test_jobs_in_a_chain_go_on_until_one_has_finished(job):
    """As `submit --chain` says it to sbatch."""
    once = {"VESPO_MAX_RESTARTS": "0"}
    first = job("echo first; exit 75", options=["--no-requeue"], **once)
    chain = ["--no-requeue", "--kill-on-invalid-dep=yes"]
    second = job("echo second", options=[*chain, f"--dependency=afternotok:{first.number}"], **once)
    third = job("echo third", options=[*chain, f"--dependency=afternotok:{second.number}"], **once)
    first.check_end(ExitCode="75:0")
    second.check_end(JobState="COMPLETED")
    third.check_end(JobState="CANCELLED")
    assert "second" in second.output and not third.output


def test_conversion_has_several_tasks_a_node(job):
    options = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem-per-cpu=100"]
    done = job(
        'echo "$SLURM_PROCID of $SLURM_NTASKS: $*"', "inspect", "x", script="convert.sbatch", options=options
    )
    done.check_end(JobState="COMPLETED")
    lines = sorted(line for line in done.output.splitlines() if " of " in line)
    assert lines == ["0 of 2: convert inspect x", "1 of 2: convert inspect x"]


def test_variables_of_trackers_reach_the_driver_and_are_not_shown(job):
    names = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "SWANLAB_API_KEY")
    program = "; ".join(f'printf %s "{name} ${name}" | md5sum' for name in names)
    done = job(program, **{name: f"secret of {name}" for name in names})
    done.check_end(JobState="COMPLETED")
    for name in names:
        assert hashlib.md5(f"{name} secret of {name}".encode()).hexdigest() in done.output
    assert "secret of" not in done.logs()


def test_no_environment(job):
    failed = job("true", VESPO_ROOT="")
    failed.check_end(JobState="FAILED")
    failed = Job(failed.slurm, failed.folder, "train.sbatch", VESPO_VENV="/nowhere")
    failed.check_end(ExitCode="1:0")
    assert "/nowhere has no megatron-vespo: set VESPO_VENV or VESPO_CONTAINER" in failed.output


@pytest.mark.slow
def test_a_requeued_job_is_as_it_was_submitted(slurm, tmp_path):
    """SLURM keeps the script and its arguments."""
    root, venv = tmp_path / "copy", stub_venv(tmp_path / "venv", UNTIL_ASKED)
    shutil.copytree(ROOT / "slurm", root / "slurm")
    script = root / "slurm/train.sbatch"
    words = [f"VESPO_ROOT={root}", f"VESPO_VENV={venv}", "VESPO_MOUNTS=/a,/b c", "--lr", "two words"]
    asked = Job(slurm, tmp_path / "job", str(script), *words)
    asked.wait_for_output("running on", WAIT_S)
    script.write_text("#!/bin/bash\nexit 9\n")
    asked.ask_to_save()
    asked.check_end(JobState="COMPLETED", Restarts="1")
    assert "attempt 2: 2 nodes" in asked.output and "resumed" in asked.output
    assert "running on n1: train --lr two words --ray-address" in asked.output


def small_run(folder: Path) -> str:
    """A recipe with a name and a value that need quotes."""
    flags = f"--hf-checkpoint {folder} --prompt-data d --output-dir o --save c --load c # all\n--lr 1"
    return str(recipe(folder / "my recipe #2.flags", f"{flags} --answer-pattern :"))


def test_a_recipe_is_submitted(slurm, tmp_path):
    """Also where a job does not get the environment of who submits it."""
    venv = stub_venv(tmp_path / "venv", 'echo "$SLURM_JOB_NAME ${VESPO_RAY_OPTIONS-}: $*"')
    words = ["--nodes", "2", "--venv", venv, "--time", "20", "--gpu", "other", "--train-iters", "8"]
    job = SubmittedJob(
        slurm, tmp_path / "job", small_run(tmp_path), *words, SBATCH_EXPORT="NONE", SBATCH_TIMELIMIT="9"
    )
    job.check_end(JobState="COMPLETED", NumNodes="2", TimeLimit="00:20:00")
    flags = "--lr 1 --answer-pattern=: --train-iters 8 --ray-address"
    assert re.search(f"my recipe #2 : train --hf-checkpoint .*{flags} ", job.output)


@pytest.mark.slow
def test_a_command_that_is_shown_can_be_pasted(slurm, tmp_path):
    venv = stub_venv(tmp_path / "venv", 'printf "<%s>" "$SLURM_JOB_NAME" "$@"')
    words = ["--nodes", "2", "--venv", venv, "--time", "20", "--gpu", "other", "--train-iters", "8"]
    odd = 'it\'s "two" words \\ #1'
    name = ["--sbatch", f"job-name={odd}", "--prompt-key", odd]
    submitted = SubmittedJob(slurm, tmp_path / "job", small_run(tmp_path), *words, *name)
    submitted.check_end(JobState="COMPLETED")
    dry = [sys.executable, "-m", "megatron_vespo", "submit", small_run(tmp_path), *words, "--dry-run"]
    told = submitted.call(*dry, *name, "--sbatch", "output=job.log")
    assert told.endswith("sbatch would take it")
    pasted = PastedJob(slurm, tmp_path / "pasted", told)
    pasted.check_end(JobState="COMPLETED")
    for job in (submitted, pasted):
        assert re.search(rf"<{re.escape(odd)}><train>.*<--prompt-key><{re.escape(odd)}><--ray", job.output)
    refused = subprocess.run(
        [*dry, "--sbatch", "partition=nowhere"], capture_output=True, text=True, timeout=WAIT_S,
        env=slurm.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert refused.returncode == 2 and "sbatch would refuse the job: " in refused.stderr, refused
    assert "invalid partition specified: nowhere" in refused.stderr


def test_in_an_image_of_apptainer(slurm, tmp_path):
    """A stand-in for apptainer, which shows what it was given and does the rest without an image."""
    venv = stub_venv(tmp_path / "venv", 'echo "in it: $*"; exit 5')
    apptainer = tmp_path / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(f'#!/bin/bash\necho "given: ${{@:1:8}}"\nPATH={venv}/bin:$PATH\nexec "${{@:8}}"\n')
    apptainer.chmod(0o755)
    variables = {"VESPO_CONTAINER": "x.sif", "VESPO_CONTAINER_RUNTIME": "apptainer", "VESPO_MOUNTS": "/data"}
    path = f"{apptainer.parent}:{slurm.environment['PATH']}"
    job = Job(slurm, tmp_path / "job", "train.sbatch", "--lr", "1", PATH=path, **variables)
    job.check_end(ExitCode="5:0")
    given = f"given: exec --nv --pwd {tmp_path}/job --bind /data x.sif bash\n"
    assert job.output.count(given) == 2 and "in it: train --lr 1 --ray-address" in job.output
