"""The viewer over a real training with Megatron, SGLang and Ray, from before its first step to its end."""

import os
import re

import numpy as np
import pytest

from megatron_vespo.data.step_records import FOLDER_NAME, read_step, step_files
from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.system.plugins import load_runtime_plugins
from tests.support.runs import Run, train_command, write_questions
from tests.support.servers import make_tiny_model
from tests.support.view_server import view_server

pytestmark = pytest.mark.timeout(600)

FLAGS = "--train-iters 6 --steps-per-rollout 2 --lr 1e-3 --no-hf-export --record-responses "
FLAGS += "--reward-function tests.support.run_rewards:first_letters"


@pytest.fixture
def run(browser, tmp_path):  # without a browser, nothing is trained
    load_runtime_plugins()
    model = make_tiny_model(tmp_path / "model", seed=0)
    questions = write_questions(tmp_path / "questions.jsonl")
    command = train_command(model, questions, tmp_path / "run", *FLAGS.split())
    with Run(command, tmp_path / "log") as run:
        yield run


def value(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def test_a_training_from_its_start_to_its_end(run, open_tab, tmp_path):
    output = tmp_path / "run"
    run.wait_until(lambda: (output / "metrics.jsonl").is_file())
    with view_server(output, cache=tmp_path / "cache") as server:
        visit = open_tab(server.home)
        page = visit.page
        page.set_default_timeout(120_000)
        page.goto(server.url)
        page.goto(f"{server.home}#responses")
        # 8 responses per optimizer step: the page fills while the trainer works
        page.get_by_text(re.compile(r"^[1-9]\d* of [1-9]\d* responses")).first.wait_for()
        assert run.process.poll() is None, "the run had ended before the page showed its first step"
        run.finish()
        page.get_by_text("48 of 48 responses").wait_for()

        records = {step: read_step(path) for step, path in step_files(output / FOLDER_NAME)}
        assert list(records) == [1, 2, 3, 4, 5, 6]
        record = records[6]
        index = int(np.argmax(np.abs(record.log_w)))
        page.goto(f"{server.home}#responses?open=6.{index}")
        shown = value(page.locator("[data-fact=log-w]").inner_text())
        assert shown == pytest.approx(record.log_w[index], rel=1e-3, abs=1e-6) and shown != 0.0
        start = int(record.num_sampled[:index].sum())
        own = slice(start, start + int(record.num_sampled[index]))
        ratios = (record.pi[own] - record.completions[index].log_probs).astype(np.float64)
        last = len(ratios) - 1
        page.locator(f"[data-t='{last}']").click()
        assert value(page.locator("[data-value=ratio]").inner_text()) == pytest.approx(
            ratios[last], rel=2e-3, abs=2e-6
        )
        assert np.isfinite(record.pi).all() and np.isfinite(record.pi_old).all()

        # what the trainer reported of the whole batch is what the files hold
        batches = batch_records(read_metrics(output / "metrics.jsonl"))
        pairs = zip(batches, (np.r_[records[s].log_w, records[s + 1].log_w] for s in (1, 3, 5)), strict=True)
        for batch, log_w in pairs:
            assert batch["ratio/log_w_mean"] == pytest.approx(log_w.mean(), rel=1e-4, abs=1e-6)
        if picture := os.environ.get("VESPO_SCREENSHOT"):
            page.screenshot(path=picture, full_page=True)
        page.goto("about:blank")  # it asks no more when the server ends
