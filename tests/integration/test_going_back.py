"""A run that is taken back to an older checkpoint repeats what followed it, bit for bit."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from megatron_vespo.checkpoints.run_folder import newest_step, saved_steps
from megatron_vespo.observability.metrics import read_metrics
from tests.support.interrupted import command, curve
from tests.support.runs import START_S, Run, finished

STEPS, BACK_TO = 16, 8
LENGTH = ("--train-iters", str(STEPS))
RECORDED = "--save-rollouts"


def finish(model: Path, folder: Path, *flags: str) -> str:
    """Run to the end; what it has said."""
    recorded = (RECORDED, str(folder / "rollouts"))
    return finished(command(model, folder, *LENGTH, *recorded, *flags), folder / "log")


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A run of 16 steps with checkpoints of 4, 8, 12 and 16."""
    folder = tmp_path_factory.mktemp("trained")
    finish(tiny_model, folder)
    assert saved_steps(folder / "saved") == [4, 8, 12, 16]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["--ckpt-step", "iter_"])
def test_a_run_that_goes_back_repeats_what_followed(tiny_model, trained, tmp_path, spelling):
    folder, saved = tmp_path / "run", tmp_path / "run/saved"
    shutil.copytree(trained, folder)
    flags = ["--load", str(saved / f"iter_{BACK_TO:07d}")]
    if spelling == "--ckpt-step":
        flags = ["--ckpt-step", str(BACK_TO)]
    said = finish(tiny_model, folder, *flags)
    assert f"resumed at optimizer step {BACK_TO}," in said
    assert "log-probs saved with it differ by 0.0e+00 at most" in said
    assert f"optimizer steps 12, 16: the first save moves them to {saved / 'set-aside-001'}" in said
    assert curve(folder) == curve(trained)
    cut = read_metrics(folder / "out/metrics.previous.jsonl")
    assert {record["step"] for record in cut if "train/loss" in record} == {10, 12, 14, 16}
    assert saved_steps(saved) == [4, 8, 12, 16] and newest_step(saved) == STEPS
    assert saved_steps(saved / "set-aside-001") == [12, 16]
    aside = folder / "rollouts/set-aside-001"
    later = [f"batch-{i:06d}.{suffix}" for i in range(4, 8) for suffix in ("jsonl", "npz")]
    assert [path.name for path in sorted(aside.iterdir())] == later
    for path in aside.iterdir():
        assert path.read_bytes() == (folder / "rollouts" / path.name).read_bytes()


@pytest.mark.slow
def test_a_job_that_is_started_again_goes_back_once(tiny_model, trained, tmp_path):
    """As a requeue does: the same command, after SIGTERM behind its first save."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    flags = [*LENGTH, "--ckpt-step", str(BACK_TO), RECORDED, str(folder / "rollouts")]
    with Run(command(tiny_model, folder, *flags), tmp_path / "log") as run:
        run.wait_for_output(f"\n12/{STEPS} ", START_S)
        run.process.terminate()
        run.finish(60, code=75)
    said = finish(tiny_model, folder, "--ckpt-step", str(BACK_TO))
    assert f"this command has gone back to optimizer step {BACK_TO} before and goes on from there" in said
    assert "resumed at optimizer step 12," in said or "resumed at optimizer step 14," in said
    assert curve(folder) == curve(trained)
    assert [path.name for path in (folder / "saved").glob("set-aside-*")] == ["set-aside-001"]


@pytest.mark.slow
def test_a_trainer_that_dies_goes_on_from_its_own_newest_checkpoint(tiny_model, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    with Run(command(tiny_model, folder, *LENGTH, "--ckpt-step", str(BACK_TO)), tmp_path / "log") as run:
        run.wait_for_output(f"\n14/{STEPS} ", START_S)
        run.titled("ray::TrainerWorker")[-1].kill()
        run.finish()
    assert "RESTART OF THE TRAINER from " in run.output and "resumed at optimizer step 12," in run.output
    assert curve(folder) == curve(trained)


@pytest.mark.slow
def test_an_asynchronous_run_goes_back_to_the_groups_of_then(tiny_model, tmp_path):
    folder, flags = tmp_path / "run", ["--max-staleness", "4"]
    finish(tiny_model, folder, *flags)
    said = finish(tiny_model, folder, *flags, "--ckpt-step", str(BACK_TO))
    assert f"resumed at optimizer step {BACK_TO}," in said
    assert "log-probs saved with it differ by 0.0e+00 at most" in said
    steps = [record["step"] for record in curve(folder) if "train/loss" in record]
    assert steps == list(range(2, STEPS + 1, 2))
    assert saved_steps(folder / "saved/set-aside-001") == [12, 16]


@pytest.mark.slow
def test_a_finished_run_says_so_and_another_learning_rate_counts(tiny_model, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    paths = json.loads((folder / "out/summary.json").read_text())
    paths["paths"]["checkpoint"] = str(folder / "saved")  # as if it had been trained here
    (folder / "out/summary.json").write_text(json.dumps(paths))
    before = (folder / "out/metrics.jsonl").read_bytes()
    started = time.monotonic()
    said = finish(tiny_model, folder)
    print(f"said after {time.monotonic() - started:.1f} s: {said}")
    assert said.splitlines()[-1] == (
        f"16 of 16 steps are done: {folder}/saved/iter_0000016, summary in {folder}/out/summary.json"
    )
    assert "start Ray" not in said and (folder / "out/metrics.jsonl").read_bytes() == before
    assert not (folder / "out/run-002.json").exists()

    said = finish(tiny_model, folder, "--lr", "5e-5", "--ckpt-step", "12")
    assert "--lr 5e-05 (the checkpoint had 0.0001)" in said
    rates = {r["step"]: r["train/learning_rate"] for r in curve(folder) if "train/learning_rate" in r}
    assert rates[12] == 1e-4 and rates[14] == rates[16] == 5e-5
    record = json.loads((folder / "out/run-002.json").read_text())
    assert record["resumed_from"] == f"{folder}/saved/iter_0000012" and record["went_back_to"] == 12
    assert record["changed"]["lr"] == 5e-5 and record["arguments"]["hidden_size"] > 0
    assert "--ckpt-step 12" in record["command"] and record["nodes"][0]["cpus"] > 0
