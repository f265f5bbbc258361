"""A run that is resumed has the prompts that it began with, on every day; others are refused at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.checkpoints.names import BUFFER_NAME
from megatron_vespo.checkpoints.run_folder import newest_save
from megatron_vespo.data.rollout_file import batch_path, read_record
from tests.support.runs import finished, train_command, write_questions

CLOCK = "{{ strftime_now('%H%M%S') }}"  # a second stands for a day


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_asynchronous_run_whose_template_writes_the_date(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(CLOCK + template)
    saved, rollouts = tmp_path / "saved", tmp_path / "rollouts"

    def ended(name: str, data: Path, *more: str, code: int = 0) -> str:
        flags = "--steps-per-rollout 2 --max-staleness 4 --save-interval 2 --no-hf-export "
        flags += f"--save {saved} --load {saved} --save-rollouts {rollouts}"
        command = train_command(model, data, tmp_path / "out", *flags.split(), *more)
        return finished(command, tmp_path / name, code=code)

    questions = write_questions(tmp_path / "questions.jsonl", 64)
    ended("first", questions, "--train-iters", "4")
    with np.load(newest_save(saved) / BUFFER_NAME) as pending:
        assert len(pending["serials"]) > 0, "nothing is in flight, nothing would be compared"

    fewer = write_questions(tmp_path / "fewer.jsonl", 40)
    output = ended("fewer", fewer, "--train-iters", "6", code=2)
    assert "fewer.jsonl has 40 within --max-prompt-tokens, there were 64" in output, output
    assert "Ray" not in output
    (model / "chat_template.jinja").write_text(template)
    output = ended("template", questions, "--train-iters", "6", code=2)
    assert "has the same question and answer but other tokens (64 of 64 have)" in output, output

    (model / "chat_template.jinja").write_text(CLOCK + template)
    moved = questions.rename(tmp_path / "moved.jsonl")
    output = ended("second", moved, "--train-iters", "6")
    assert "resumed at optimizer step 4" in output, output
    groups = [group for number in range(3) for group in read_record(batch_path(rollouts, number)).groups]
    assert len({tuple(group[0].prompt.token_ids[: len("235959")].tolist()) for group in groups}) == 1
