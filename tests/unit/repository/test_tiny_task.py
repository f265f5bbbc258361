"""The tiny example: its problems, its tokenizer, its demonstrations and the all-or-nothing output folder."""

from __future__ import annotations

import importlib
import json
import random
import string
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "tiny"))
task = importlib.import_module("task")
make_base_model = importlib.import_module("make_base_model")

EXAMPLE = task.Problem((3, 8, 5, 9, 2))
SMALL = make_base_model.Recipe(
    num_train=5,
    num_held_out=3,
    num_layers=1,
    hidden_size=16,
    num_experts=2,
    moe_intermediate_size=8,
    steps=2,
    warmup_steps=1,
    worked_per_step=3,
    direct_per_step=2,
    max_new_tokens=4,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As a user gets it: saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_base_model.make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_problem_spells_question_and_both_answers():
    assert EXAMPLE.question == "(3+8+5+9+2)%7"
    assert EXAMPLE.answer == "6"
    assert EXAMPLE.direct == "\\boxed{6}"
    assert EXAMPLE.worked == "3;4;2;4;6;\\boxed{6}"


def test_draws_stay_in_their_set_and_cover_the_digits():
    rng = random.Random(0)
    train = task.draw_distinct(rng, 2000, held_out=False)
    held_out = task.draw_distinct(rng, 500, held_out=True)
    assert len(set(train)) == 2000 and len(set(held_out)) == 500
    assert not set(train) & set(held_out)
    assert {digit for problem in train for digit in problem.digits} == set(range(1, 10))
    answers = Counter(problem.answer for problem in train)
    assert set(answers) == set("0123456") and max(answers.values()) < 2000 * 0.2


def test_about_one_problem_in_five_is_held_out():
    problems = [
        task.Problem((a, b, c, 1, 2)) for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)
    ]
    assert 0.15 < sum(problem.is_held_out for problem in problems) / len(problems) < 0.25


def test_draws_repeat_with_the_seed():
    first, second, other = (task.draw_distinct(random.Random(s), 20, held_out=True) for s in (7, 7, 8))
    assert first == second != other


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("\\boxed{6}", True),
        ("3;4;2;4;6;\\boxed{6}", True),
        ("\\boxed{1}\\boxed{6}", True),
        ("\\boxed{6}\\boxed{1}", False),
        ("\\boxed{16}", False),
        ("\\boxed{6", False),
        ("6", False),
        ("", False),
    ],
)
def test_last_box_decides(completion, right):
    assert task.is_correct(completion, "6") is right


def test_every_printable_character_is_one_token(tokenizer):
    text = "".join(c for c in string.printable if c.isprintable()) + "\n"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(set(token_ids)) == len(text) == 96
    assert tokenizer.unk_token_id not in token_ids
    assert tokenizer.decode(token_ids) == text
    assert len(tokenizer) == 128 and len(tokenizer) % 8 == 0


def test_box_is_one_token_that_decoding_keeps(tokenizer):
    token_ids = tokenizer.encode("\\boxed{6}<eos>", add_special_tokens=False)
    assert len(token_ids) == 4 and token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "\\boxed{6}"


def test_other_characters_become_one_unknown_token_each(tokenizer):
    token_ids = tokenizer.encode("a€é", add_special_tokens=False)
    assert token_ids[1:] == [tokenizer.unk_token_id] * 2 and token_ids[0] != tokenizer.unk_token_id


def test_chat_template_marks_roles_and_adds_nothing_else(tokenizer):
    chat = [{"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>1+1<|assistant|>"
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 5
    answered = [*chat, {"role": "assistant", "content": "2"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "<|user|>1+1<|assistant|>2<eos>"


def test_demonstrations_weigh_styles_by_the_first_token_only(tokenizer):
    recipe = make_base_model.Recipe(worked_per_step=6, direct_per_step=2)
    token_ids, weights = make_base_model.demonstrations(recipe, tokenizer, random.Random(0))
    prompt, worked, direct = 15, 14, 4  # tokens; both responses end with <eos>
    assert token_ids.shape == weights.shape == (8, prompt + worked)
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    assert all(";" in text for text in texts[:6]) and not any(";" in text for text in texts[6:])
    assert weights[:, :prompt].count_nonzero() == 0
    assert weights[6:, prompt + direct :].count_nonzero() == 0
    torch.testing.assert_close(weights[:6, prompt].sum().item(), 1 - recipe.direct_share)
    torch.testing.assert_close(weights[6:, prompt].sum().item(), recipe.direct_share)
    assert (weights[:6, prompt + 1 :] == 1 / 8).all()
    assert (weights[6:, prompt + 1 : prompt + direct] == 1 / 8).all()
    assert (token_ids[6:, prompt + direct - 1] == tokenizer.eos_token_id).all()


def test_make_writes_a_loadable_checkpoint_and_disjoint_data(tmp_path):
    make_base_model.make(tmp_path, SMALL)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    }
    assert [len(r) for r in rows.values()] == [5, 3]
    for row in rows["train.jsonl"] + rows["heldout.jsonl"]:
        assert eval(row["question"]) == int(row["answer"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.architectures == ["Qwen3MoeForCausalLM"] and model.dtype == torch.float32
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "base"))
    assert model.generation_config.eos_token_id == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "heldout.jsonl", "train.jsonl"]


def test_second_call_keeps_the_result_and_another_recipe_replaces_it(tmp_path, capsys):
    make_base_model.make(tmp_path, SMALL)
    weights = tmp_path / "base" / "model.safetensors"
    first = weights.read_bytes(), weights.stat().st_mtime_ns
    capsys.readouterr()
    make_base_model.make(tmp_path, SMALL)
    assert capsys.readouterr().out == f"{tmp_path}/base is up to date\n"
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == first
    other = make_base_model.Recipe(**{**make_base_model.asdict(SMALL), "seed": 1})
    make_base_model.make(tmp_path, other)
    assert weights.read_bytes() != first[0]
    assert json.loads((tmp_path / "base" / "recipe.json").read_text())["recipe"]["seed"] == 1


def test_missing_data_file_is_made_again(tmp_path):
    make_base_model.make(tmp_path, SMALL)
    (tmp_path / "train.jsonl").unlink()
    make_base_model.make(tmp_path, SMALL)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 5


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_base_model, "warm_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_base_model.make(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_too_good_a_start_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(make_base_model, "warm_start", lambda *_: 0.5)
    with pytest.raises(ValueError, match=r"sampled accuracy of 0\.500, above 0\.35: try another --seed"):
        make_base_model.make(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists and was not made here: choose another --output"):
        make_base_model.make(tmp_path, SMALL)
    assert (tmp_path / "base" / "config.json").read_text() == "{}"
