"""The smollm2 example without its model: problems, reward, demonstrations, the config of a GGUF file."""

from __future__ import annotations

import importlib
import json
import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "smollm2"))
word_problems = importlib.import_module("word_problems")
prepare = importlib.import_module("prepare")
warm_up = importlib.import_module("warm_up")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("70 - 27", 43), ("7+8", 15), ("6 * 13 - 8", 70), (" (2 + 3) / 4 ", Fraction(5, 4)), ("12.5 * 2", 25),
        ("0.1 + 0.2", Fraction(3, 10)), ("- 3 + 5", 2), ("43", 43),
        ("", None), ("7 +", None), ("7 / 0", None), ("2 ** 30", None), ("7 // 2", None), ("07 + 1", None),
        ("seven", None), ("70 - 27 = 43", None), ("7 + 1\n", None), ("f(1)", None), ("1e9 * 2", None),
        ("(" * 50, None), ("1 + " * 20 + "1", None), ("2.5.1", None), ("7 (3)", None),
    ],
)  # fmt: skip
def test_value_of_a_calculation(text, value):
    assert word_problems.value(text) == value


def test_the_reward_is_one_for_the_value_of_the_answer():
    reward = word_problems.reward
    assert [reward(text, "43", {}) for text in ("70 - 27", "27 - 70", "43 apples", "")] == [1.0, 0, 0, 0]
    assert reward("5 / 4", "5/4", {}) == 1.0
    assert reward("10 / 3", "333333/100000", {}) == 1.0  # the data has six digits
    assert reward("10 / 3", "33/10", {}) == 0.0


def write_source(folder: Path, rows: list[tuple[str, float]]) -> Path:
    lines = [json.dumps({"input": problem, "target": target}) for problem, target in rows]
    path = folder / "source.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_story_is_read_once_whatever_its_numbers_and_spelling(tmp_path):
    source = write_source(
        tmp_path, [("Ann has 3 cups .  Bob has 4.", 7.0), ("ann has 5 cups. Bob has 6.", 11), ("A box", 1.25)]
    )
    rows = word_problems.read_problems(source)
    assert [row["answer"] for row in rows] == ["7", "5/4"]
    assert rows[0]["question"] == "Ann has 3 cups . Bob has 4."


def test_the_parts_have_no_story_in_common(tmp_path, monkeypatch, capsys):
    words = ["red", "blue", "green", "tall", "small", "old"]
    stories = [f"{a} {b} {c} has 3 and 4" for a in words for b in words for c in words]
    source = write_source(tmp_path, [(story, 7) for story in stories + stories[:20]])
    for output in ("one", "two"):
        monkeypatch.setattr(
            sys, "argv", ["", "--source", str(source), "--output", str(tmp_path / output), "--seed", "5"]
        )
        word_problems.main()
    parts = {}
    for name in ("train", "heldout"):
        text = (tmp_path / "one" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "two" / f"{name}.jsonl").read_text()
        parts[name] = [json.loads(line)["question"] for line in text.splitlines()]
    assert len(parts["heldout"]) == word_problems.NUM_HELD_OUT
    assert sorted(parts["train"] + parts["heldout"]) == sorted(stories)
    assert f"{len(parts['train'])} problems" in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    missing = tmp_path / "missing.jsonl"
    monkeypatch.setattr(sys, "argv", ["", "--source", str(missing), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"there is no {missing}; see README.md for it"):
        word_problems.main()


def test_a_demonstration_has_any_two_numbers_the_larger_one_first():
    rng = random.Random(0)
    seen = {warm_up.calculation_of("3 red, 4 blue or 2.5 green?", "-", rng) for _ in range(200)}
    assert seen == {"4 - 3", "3 - 2.5", "4 - 2.5"}
    assert warm_up.calculation_of("How many are 3 and three?", "-", rng) is None


def test_the_loss_counts_responses_only():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    batch = [([1, 2, 3], [4, 5]), ([6], [7])]
    log_probs = []
    for prompt, response in batch:
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        log_probs += [logits[len(prompt) + i - 1, token] for i, token in enumerate(response)]
    torch.testing.assert_close(warm_up.loss_of(model, batch), -torch.stack(log_probs).mean())


def test_the_config_is_that_of_an_ordinary_model():
    read = LlamaConfig(hidden_size=64, rms_norm_eps=9.999999747378752e-06, tie_word_embeddings=True)
    read.quantization_config = {"quant_method": "gguf"}
    read._model_name_or_path = "a title"
    plain = prepare.plain_config(read)
    assert plain.rms_norm_eps == 1e-5 and plain.hidden_size == 64 and plain.tie_word_embeddings
    assert not {"quantization_config", "_model_name_or_path"} & plain.to_dict().keys()


def test_what_is_there_is_not_made_again(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    prepare.prepare(tmp_path, tmp_path / "packages")
    assert "is there already" in capsys.readouterr().out
