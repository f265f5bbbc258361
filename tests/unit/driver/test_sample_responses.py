"""The few responses of every step that a run keeps for people."""

from __future__ import annotations

import numpy as np

from megatron_vespo.driver.sample_responses import (
    FILE_NAME,
    SampleResponses,
    chosen_samples,
    read_sample_responses,
)
from megatron_vespo.driver.trained_step import TrainedStep
from tests.support.builders import make_completion, make_prompt, make_sample


class Letters:
    def batch_decode(self, tokens, skip_special_tokens):
        return ["".join(chr(ord("a") + token) for token in ids) for ids in tokens]


def step(number: int, log_w: list[float], rewards: list[float]) -> TrainedStep:
    prompt = make_prompt(7, text="which letters?", answer="b")
    completions = [make_completion(prompt, [i, i], reward=reward) for i, reward in enumerate(rewards)]
    samples = [make_sample(1, 2, reward=reward, advantage=reward - 0.5) for reward in rewards]
    result = {"log_w": np.array(log_w, np.float32), "weight": np.full(len(log_w), 0.25, np.float32)}
    return TrainedStep(number, completions, samples, result)


def test_the_extremes_are_chosen_and_each_response_once():
    one = step(1, [0.5, -3.0, 2.0, 0.0], [0.0, 1.0, 0.5, 0.25])
    assert chosen_samples(one) == {2: "largest log W", 1: "smallest log W", 0: "lowest reward"}


def test_rows_have_the_numbers_of_their_own_response(tmp_path):
    told = []
    write = SampleResponses(tmp_path, Letters(), 10, None, lambda number, rows: told.append((number, rows)))
    write(step(1, [0.5, -3.0], [0.0, 1.0]))
    rows = read_sample_responses(tmp_path / FILE_NAME)
    assert [(row["turns"][0]["text"], row["log_w"], row["reward"], row["advantage"]) for row in rows] == [
        ("aa", 0.5, 0.0, -0.5),
        ("bb", -3.0, 1.0, 0.5),
    ]
    assert {(row["step"], row["prompt"], row["answer"], row["weight"]) for row in rows} == {
        (1, "which letters?", "b", 0.25)
    }
    assert told == [(1, rows)]


def test_long_runs_write_some_steps_and_the_last(tmp_path):
    write = SampleResponses(tmp_path, Letters(), 499, None)
    for number in range(1, 500):
        write(step(number, [0.5], [0.0]))
    steps = [row["step"] for row in read_sample_responses(tmp_path / FILE_NAME)]
    assert steps[:3] == [9, 18, 27] and steps[-1] == 499 and len(steps) == 56


def test_a_resumed_run_drops_later_steps_and_a_fresh_one_all(tmp_path):
    write = SampleResponses(tmp_path, Letters(), 10, None)
    for number in (1, 2, 3):
        write(step(number, [0.5], [0.0]))
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes() + b'{"step": 4, "wh')  # a killed run
    SampleResponses(tmp_path, Letters(), 10, 2)(step(3, [1.5], [0.0]))
    assert [(row["step"], row["log_w"]) for row in read_sample_responses(path)] == [
        (1, 0.5),
        (2, 0.5),
        (3, 1.5),
    ]
    SampleResponses(tmp_path, Letters(), 10, None)
    assert read_sample_responses(path) == []
