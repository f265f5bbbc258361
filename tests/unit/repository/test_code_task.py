"""The code example: its problems, their hidden tests, its demonstrations, and the model that it makes."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from megatron_vespo.rewards.code import extract_program

for folder in ("tiny", "code"):
    sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / folder))
functions = importlib.import_module("functions")
make_code_model = importlib.import_module("make_code_model")
make_base_model = importlib.import_module("make_base_model")

EXAMPLE = functions.Problem("+", 17, "at most", 60)
SMALL = make_code_model.Recipe(
    num_train=5,
    num_held_out=3,
    num_layers=1,
    hidden_size=16,
    num_experts=2,
    moe_intermediate_size=8,
    steps=2,
    warmup_steps=1,
    careful_per_step=4,
    mixed_up_per_step=2,
    hasty_per_step=1,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_code_model.make_tokenizer()


def passes(response: str, answer: str) -> bool:
    """Run our own text, without the sandbox, which has tests of its own."""
    namespace: dict = {}
    exec(extract_program(response) or "", namespace)
    return all(namespace["f"](*arguments) == value for arguments, value in json.loads(answer)["cases"])


@pytest.mark.parametrize("held_out", [False, True])
def test_only_careful_functions_pass_the_hidden_tests(held_out):
    rng = random.Random(0)
    for problem in (functions.draw(rng, held_out=held_out) for _ in range(50)):
        assert problem.is_held_out == held_out
        ways = (problem.careful, problem.mixed_up, problem.hasty)
        assert [passes(way, problem.answer) for way in ways] == [True, False, False], problem.question
        assert len(json.loads(problem.answer)["cases"]) == 2 * functions.CASES_PER_SIDE


def test_the_question_and_its_careful_function():
    assert EXAMPLE.question == "f(x): x+17, at most 60"
    assert EXAMPLE.careful == (
        "```python\ndef f(x):\n    y = x+17\n    if y > 60:\n        return 60\n    return y\n```"
    )


def test_the_ways_part_at_one_token_each_which_carries_the_shares(tokenizer):
    token_ids, weights = make_code_model.demonstrations(SMALL, tokenizer, random.Random(0))
    special = []
    for row in zip(token_ids.tolist(), weights.tolist(), strict=True):
        weighted = [(tokenizer.decode([token]), weight) for token, weight in zip(*row, strict=True) if weight]
        special.append([(word, weight) for word, weight in weighted if weight != pytest.approx(1 / 7)])
    limit, direction = SMALL.limit_share / 6, SMALL.right_share
    for row, share in zip(special[:6], [direction / 4] * 4 + [(1 - direction) / 2] * 2, strict=True):
        assert row[0][0].startswith("    y = x") and row[0][1] == pytest.approx(limit)
        assert row[1:] == [(row[1][0], pytest.approx(share))] and row[1][0] in "<>"
    assert special[6] == [("    ", pytest.approx(1 - SMALL.limit_share))]


def test_the_tokenizer_writes_every_problem(tokenizer):
    rng = random.Random(1)
    for problem in (functions.draw(rng, held_out=True) for _ in range(20)):
        for text in (problem.question, problem.careful, problem.hasty):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_model_is_made_once(tmp_path, capsys):
    arguments = (tmp_path, SMALL, make_code_model.build, make_code_model.SOURCES)
    make_base_model.make(*arguments)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [json.loads(row["answer"])["function"] for row in rows] == ["f"] * 5
    capsys.readouterr()
    make_base_model.make(*arguments)
    assert capsys.readouterr().out == f"{tmp_path}/base is up to date\n"
