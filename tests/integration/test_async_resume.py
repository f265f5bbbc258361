"""An asynchronous run that is killed and goes on trains on every prompt once."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_vespo.checkpoints.names import BUFFER_NAME
from megatron_vespo.checkpoints.run_folder import newest_save
from megatron_vespo.data.prompts import Columns, PromptCursor, load_prompts
from megatron_vespo.data.rollout_file import batch_path, read_record
from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.observability.metrics import read_metrics
from tests.support.runs import START_S, Run, nothing_left, train_command, write_questions

STEPS, MINI_BATCHES, BATCH_SIZE, SEED = 40, 2, 4, 7


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_group_is_lost_and_none_is_trained_twice(tiny_model, tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl", 400)  # more than are taken
    saved, rollouts = tmp_path / "saved", tmp_path / "rollouts"
    flags = f"--train-iters {STEPS} --steps-per-rollout {MINI_BATCHES} --max-staleness 4 --save-interval 4 "
    flags += f"--save {saved} --load {saved} --save-rollouts {rollouts} --no-hf-export --async-save "
    flags += "--reward-function tests.support.run_rewards:all_letters "
    flags += "--stop-generation-while-training --over-subscription 2 "
    flags += f"--max-completion-tokens 200 --max-attempts 1000 --seed {SEED}"
    command = train_command(tiny_model, questions, tmp_path / "out", *flags.split())
    draw = random.Random(1)
    resumed_with = []
    for number in range(5):
        with Run(command, tmp_path / f"log-{number}") as run:
            if number < 4:
                run.wait_for_output(f"\n{4 * (number + 1):>2}/{STEPS} ", START_S)
                time.sleep(draw.uniform(0.0, 2.0))
                run.process.kill()
                run.process.wait()
            else:
                assert run.wait(START_S) == 0, run.output
            assert nothing_left(run, timeout_s=30.0)
        resumed_with += [line for line in run.output.splitlines() if "resumed at" in line]
    print(*resumed_with, sep="\n")
    assert len(resumed_with) == 4
    batches = STEPS // MINI_BATCHES
    trained = [
        group[0].prompt.prompt_id
        for batch in range(batches)
        for group in read_record(batch_path(rollouts, batch)).groups
    ]
    assert len(trained) == len(set(trained)) == batches * BATCH_SIZE
    state = np.load(newest_save(saved) / BUFFER_NAME)
    pending = state["prompt_ids"].tolist()
    print(f"{len(pending)} prompts are pending at the end, with {len(state['places'])} drafts")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = load_prompts(
        questions, ChatFormat(tokenizer), Columns("question", "answer"), max_prompt_tokens=512,
        overlong="error", flag="--prompt-data",
    ).prompts  # fmt: skip
    taken = PromptCursor(prompts, SEED).take(len(trained) + len(pending))
    assert sorted(trained + pending) == sorted(prompt.prompt_id for prompt in taken)
    records = [r for r in read_metrics(tmp_path / "out/metrics.jsonl") if "reward/mean" in r]
    assert [r["step"] for r in records] == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
    assert max(r["staleness/total_max"] for r in records) <= 4
