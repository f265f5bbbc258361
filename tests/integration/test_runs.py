"""Whole runs on the real stack: the tiny example, a resume, real data, and what happens when things break."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.system.http import EngineRequestError, post_json
from megatron_vespo.system.ports import find_free_port
from tests.support.runs import ROOT, Run, finished, nothing_left, train_command, write_questions

GSM8K = ROOT.parent / "shared/data/gsm8k/train.jsonl"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """examples/tiny/run.sh as it is, but for 40 of its steps; its output folder."""
    output = tmp_path_factory.mktemp("tiny") / "run"
    flags = ["--train-iters", "40", "--output-dir", str(output), "--save", str(output / "checkpoints")]
    finished(["bash", "examples/tiny/run.sh", *flags], output.with_suffix(".log"), 900)
    return output


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_questions(tmp_path / "questions.jsonl")


@pytest.mark.timeout(960)
def test_the_tiny_example_learns(tiny_run):
    summary = json.loads((tiny_run / "summary.json").read_text())
    print(summary)
    assert summary["eval_accuracy_before"] <= 0.35
    assert summary["eval_accuracy_after"] >= 0.80
    assert summary["train_seconds"] <= 600
    assert summary["steps"] == 40
    assert summary["layout"] == {
        "tensor": 2, "pipeline": 2, "virtual_pipeline": 1, "context": 1, "expert": 2, "expert_tensor": 1,
        "data": 1, "trainer_ranks": 4, "engines": 1,
    }  # fmt: skip


@pytest.mark.timeout(960)
def test_engine_and_trainer_agree_after_every_sync(tiny_run):
    records = read_metrics(tiny_run / "metrics.jsonl")
    batches = [record for record in records if "check/max_logprob_difference" in record]
    assert [record["step"] for record in batches] == list(range(4, 41, 4))
    assert max(record["check/max_logprob_difference"] for record in batches) <= 1e-4
    assert {record["check/unchanged_log_w_abs_max"] for record in batches} == {0.0}
    assert all(record["policy/version"] == record["step"] for record in batches)
    assert all(record["sync/weight_check_seconds"] > 0 for record in batches)
    # nothing is trained after the last sync: completions of its own check it
    assert records[-1]["check/last_sync_logprob_difference"] <= 1e-4


@pytest.mark.timeout(960)
def test_what_a_run_leaves_is_complete(tiny_run):
    said = tiny_run.with_suffix(".log").read_text()
    for part in ("layers", "attention", "norms", "experts", "optimizer", "log-probs"):
        assert len(re.findall(rf"^ *{part}: .+\(.+\)", said, re.MULTILINE)) == 1, part
    assert (tiny_run / "curves.png").stat().st_size > 10_000
    report = (tiny_run / "report.html").read_text()
    assert "The run has finished.</strong> 40 of 40 optimizer steps are done." in report
    assert str(tiny_run / "report.html") in said and len(report) < 2**20
    assert list((tiny_run / "tensorboard").glob("events.*"))
    assert (tiny_run / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "40"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_run / "hf")
    loading = AutoModelForCausalLM.from_pretrained(tiny_run / "hf", output_loading_info=True)[1]
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_resume_at_another_layout_goes_on_where_it_stopped(tiny_run, tmp_path):
    """Two context-parallel ranks instead of tensor times pipeline parallel, on the engine's routes."""
    work = ROOT / "examples/tiny/work"
    flags = ["--load", str(tiny_run / "checkpoints"), "--lr", "5e-5", "--train-iters", "44"]
    flags += ["--steps-per-rollout", "4", "--pipeline-model-parallel-size", "1", "--routing-replay", "R3"]
    flags += ["--expert-model-parallel-size", "2", "--context-parallel-size", "2"]
    flags += ["--weight-check-interval", "1"]
    command = train_command(work / "base", work / "train.jsonl", tmp_path / "out", *flags)
    said = finished(command, tmp_path / "log")
    assert "resumed at optimizer step 40, 320 prompts consumed" in said
    record, last_check = read_metrics(tmp_path / "out/metrics.jsonl")
    # an engine has loaded an export after either sync, and answers with its weights
    assert not (tmp_path / "out/weight-check").exists()
    print("weight check with an export:", record["sync/weight_check_seconds"])
    assert last_check["check/last_sync_logprob_difference"] <= 1e-4
    assert record["step"] == 44
    assert record["reward/mean"] > 0.7, "the resumed policy has forgotten what it learned"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not GSM8K.exists(), reason=f"no real questions at {GSM8K}")
def test_three_steps_on_gsm8k(tiny_model, tmp_path):
    flags = ["--answer-pattern", r"####\s*(.+)", "--eval-data", str(GSM8K.with_name("test.jsonl"))]
    flags += ["--eval-prompts", "8", "--ratio-denominator", "decoupled"]
    said = finished(train_command(tiny_model, GSM8K, tmp_path / "out", *flags), tmp_path / "log")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["steps"] == 3 and summary["max_logprob_difference"] <= 1e-4
    assert "prompts over --max-prompt-tokens 512 skipped" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_alarm_saves_and_stops(tiny_model, questions, tmp_path):
    """Random weights answer nothing right: all rewards are equal from the first batch on."""
    saved, output = tmp_path / "checkpoints", tmp_path / "out"
    flags = ["--on-alarm", "checkpoint-and-stop", "--save", str(saved), "--train-iters", "10000"]
    said = finished(train_command(tiny_model, questions, output, *flags), tmp_path / "log", code=1)
    last = said.splitlines()[-1]
    assert last.startswith("megatron-vespo: stopped by alarm equal_groups at optimizer step 1: in 100% of ")
    assert last.endswith(f"; checkpoint in {saved}")
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "1"
    [record] = batch_records(read_metrics(output / "metrics.jsonl"))
    assert record["alarm/equal_groups"] == 1.0
    assert (output / "curves.png").stat().st_size > 10_000
    report = (output / "report.html").read_text()
    assert "An alarm stopped the run." in report and "stopped by alarm equal_groups" in report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dynamic_sampling_penalty_and_budget_in_a_run(tiny_model, tmp_path):
    """A random model: about one response in four ends, which is right for every other prompt."""
    data, out = tmp_path / "questions.jsonl", tmp_path / "out"
    rows = [{"question": f"{i} + 1 = ?", "answer": "wanted" if i % 2 else "unwanted"} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--dynamic-sampling --dynamic-sampling-max-batches 4 --overlong-buffer 16 --overlong-penalty 0.5 "
    flags += "--advantage-estimator leave-one-out --vespo-budget 1.2 "
    flags += "--reward-function tests.support.run_rewards:ended_and_wanted"
    finished(train_command(tiny_model, data, out, *flags.split()), tmp_path / "log")
    records = [r for r in read_metrics(out / "metrics.jsonl") if "rollout/generated_prompts" in r]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        print({name: value for name, value in record.items() if name.startswith(("roll", "rew", "bud"))})
        assert 4 <= record["rollout/generated_prompts"] <= 16
        left_out = record["rollout/filtered_groups"] + record["rollout/surplus_groups"]
        assert record["rollout/generated_prompts"] == 4 + left_out
        assert -0.5 <= record["reward/overlong_penalty_mean"] < 0 <= record["reward/mean"] < 1
        assert record["budget/c2_positive"] > 0 and record["budget/c2_negative"] > 0
    assert sum(record["rollout/filtered_groups"] for record in records) > 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("victim", "named", "log"),
    [
        ("sglang::scheduler", "megatron-vespo: engine http://127.0.0.1:", "engine-0.log"),
        ("ray::TrainerWorker", "megatron-vespo: trainer rank ", "logs/trainer-"),
    ],
)
def test_a_killed_process_ends_the_run_and_is_named(tiny_model, questions, tmp_path, victim, named, log):
    flags = ["--train-iters", "10000", "--engine-restarts", "0", "--trainer-restarts", "0"]
    with Run(train_command(tiny_model, questions, tmp_path / "out", *flags), tmp_path / "log") as run:
        run.wait_for_output(" 2/10000 ")
        run.wait_until(lambda: run.titled(victim))
        run.titled(victim)[0].kill()
        run.finish(60, code=1)
    assert re.search(f"^{named}.* died", run.output, re.MULTILINE), run.output
    assert log in run.output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_changed_behind_the_trainers_back_end_the_run(tiny_model, questions, tmp_path):
    port = find_free_port("127.0.0.1")
    other = f"http://127.0.0.1:{port + 1}"
    flags = ["--rollout-engines", "2", "--rollout-port", str(port), "--train-iters", "10000"]
    with Run(train_command(tiny_model, questions, tmp_path / "out", *flags), tmp_path / "log") as run:
        run.wait_for_output(" 2/10000 ")
        # again and again, as the next sync would repair it
        while run.process.poll() is None:
            try:
                post_json(other, "/weights_checker", {"action": "reset_tensors"}, 60)
            except EngineRequestError:
                break
        run.finish(60, code=1)
    assert re.search(
        rf"weights differ after the sync of version \d+: engine {other} has checksum \w+ of \S+, "
        rf"engine http://127.0.0.1:{port} has ",
        run.output,
    ), run.output


@pytest.mark.timeout(600)
def test_ctrl_c_ends_everything_within_ten_seconds(tiny_model, questions, tmp_path):
    with Run(
        train_command(tiny_model, questions, tmp_path / "out", "--train-iters", "10000"), tmp_path / "log"
    ) as run:
        run.wait_for_output(" 2/10000 ")
        pressed = time.monotonic()
        run.interrupt()
        assert run.wait(20) == 130
        assert nothing_left(run, timeout_s=1.0)
        seconds = time.monotonic() - pressed
    print(f"everything ended {seconds:.1f} s after Ctrl-C")
    assert seconds < 10
    assert re.search(
        r"\nmegatron-vespo: interrupted at optimizer step [1-9]\d*; without --save nothing is kept\n$",
        run.output,
    )


@pytest.mark.timeout(300)
def test_a_busy_port_is_named(tiny_model, questions, tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        command = train_command(tiny_model, questions, tmp_path / "out", "--rollout-port", str(port))
        said = finished(command, tmp_path / "log", 120, code=2)
    assert f"127.0.0.1:{port}" in said and "--rollout-port" in said


def test_help_is_one_readable_page():
    text = subprocess.run(
        ["bash", "-c", ".venv/bin/megatron-vespo train --help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    for group in (
        "model and data:",
        "rollout:",
        "policy loss:",
        "weight sync:",
        "output:",
    ):
        assert group in text
    assert len(text.splitlines()) < 180  # with every default
