"""The calculator example: its problems, its demonstrations, and the model that it makes."""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_vespo.rewards.math import math_reward
from megatron_vespo.types import Prompt

for folder in ("tiny", "calculator"):
    sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / folder))
calculator = importlib.import_module("calculator")
make_calculator_model = importlib.import_module("make_calculator_model")
make_base_model = importlib.import_module("make_base_model")

EXAMPLE = calculator.Problem(17, "*", 23, "+", 45)
SMALL = make_calculator_model.Recipe(
    num_train=5,
    num_held_out=3,
    num_layers=1,
    hidden_size=16,
    num_experts=2,
    moe_intermediate_size=8,
    steps=2,
    warmup_steps=1,
    chains_per_step=3,
    halves_per_step=2,
    guesses_per_step=1,
)


@pytest.fixture(scope="module")
def demonstrations():
    return make_calculator_model.Demonstrations(make_calculator_model.make_tokenizer(), SMALL)


def test_question_and_answer():
    assert (EXAMPLE.question, EXAMPLE.partial_result, EXAMPLE.answer) == ("(17*23)+45", 391, "436")
    problems = [calculator.draw(random.Random(seed), held_out=seed % 2 == 0) for seed in range(50)]
    assert all(eval(problem.question) == int(problem.answer) for problem in problems)
    assert [problem.is_held_out for problem in problems] == [seed % 2 == 0 for seed in range(50)]


def test_the_demonstrated_calls_get_the_demonstrated_results():
    async def play() -> None:
        environment = calculator.Calculator()
        await environment.reset(Prompt(0, [1], EXAMPLE.answer, EXAMPLE.question))
        *calls, answer = make_calculator_model.turns_of(EXAMPLE, 2)
        for turn, result in zip(calls, ["391", "436"], strict=True):
            assert await environment.step(turn) == ([{"role": "tool", "content": result}], None, False)
        assert (await environment.step(answer)).done
        assert environment.reward_data() == {"tool_calls": 2, "failed_tool_calls": 0}
        assert math_reward(answer, EXAMPLE.answer) == 1.0

    asyncio.run(play())


def test_the_chat_template_describes_the_tools(demonstrations):
    calculator.Calculator.check_template(demonstrations.form.tokenizer.chat_template)
    text = demonstrations.form.text([{"role": "user", "content": EXAMPLE.question}])
    assert '"name": "multiply"' in text and '"name": "add"' in text
    assert text.endswith("<|im_start|>user\n(17*23)+45<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_has_turns_and_given_tokens(demonstrations):
    token_ids, turns = demonstrations.conversation(EXAMPLE, 2)
    decode = demonstrations.tokenizer.decode
    of_turn = {
        number: decode([token for token, turn in zip(token_ids, turns, strict=True) if turn == number])
        for number in range(4)
    }
    assert "<unk>" not in of_turn[0]
    assert [of_turn[n] for n in (1, 2, 3)] == [
        turn + "<|im_end|>" for turn in make_calculator_model.turns_of(EXAMPLE, 2)
    ]
    assert of_turn[0].count("<|im_start|>tool") == 2


def test_only_the_first_token_of_a_turn_carries_the_shares(demonstrations):
    token_ids, weights = demonstrations.batch(random.Random(0))
    decode = demonstrations.tokenizer.decode
    first = [(row > 0).nonzero()[0].item() for row in weights]
    assert [decode(row[n]) for row, n in zip(token_ids, first, strict=True)] == (
        ["<tool_call>"] * 5 + [make_calculator_model.BOX]
    )
    shares = [weights[row, n].item() for row, n in enumerate(first)]
    assert shares == pytest.approx([SMALL.first_call_share / 5] * 5 + [1 - SMALL.first_call_share])
    assert weights[token_ids == demonstrations.tokenizer.pad_token_id].sum() == 0


def test_the_model_is_made_once(tmp_path, capsys):
    arguments = (tmp_path, SMALL, make_calculator_model.build, make_calculator_model.SOURCES)
    make_base_model.make(*arguments)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [eval(row["question"]) == int(row["answer"]) for row in rows] == [True] * 5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = "<tool_call>\n{1}\n</tool_call>\\boxed{2}"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    capsys.readouterr()
    make_base_model.make(*arguments)
    assert capsys.readouterr().out == f"{tmp_path}/base is up to date\n"
