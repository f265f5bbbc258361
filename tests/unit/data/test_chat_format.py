"""Tokenizers of HF folders, and what a chat template is handed."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path

import pytest

from megatron_vespo.arguments.training_flags import add_vespo_arguments
from megatron_vespo.data.tokenizer import ChatFormat, load_tokenizer
from tests.support.letter_tokenizer import letters

USER = [{"role": "user", "content": "q"}]
# as Qwen3's and Llama 3.2's read theirs
TEMPLATE = """\
{%- if tools %}[{{ tools[0].name }}]{% endif -%}
{%- for m in messages %}{% generation %}{{ bos_token }}{{ m.content }}{% endgeneration %}{% break %}
{%- endfor -%}
{%- if enable_thinking is defined and enable_thinking is false %}(no thought){% endif -%}
{%- if with_date %}{{ strftime_now('%d %b %Y %H:%M') }}{% endif -%}
"""


def written(chat_format: ChatFormat) -> str:
    return "".join(map(chr, chat_format.tokens(USER)))


def test_arguments_reach_the_template():
    tokenizer = letters(TEMPLATE)
    assert written(ChatFormat(tokenizer)) == "!q"
    assert written(ChatFormat(tokenizer, arguments={"enable_thinking": False})) == "!q(no thought)"
    assert written(ChatFormat(tokenizer, arguments={"tools": [{"name": "sum"}]})) == "[sum]!q"


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt", "m", "bos_token"])
def test_arguments_that_it_does_not_read_are_refused_by_name(name):
    with pytest.raises(ValueError) as refused:
        ChatFormat(letters(TEMPLATE), arguments={"enable_thinking": True, name: 1})
    assert str(refused.value) == (
        f"--chat-template-arguments: the chat template reads no argument {name!r}; those that it reads are "
        "enable_thinking, tools, with_date"
    )


def test_arguments_need_a_template():
    with pytest.raises(ValueError, match="^--chat-template-arguments is for a chat template, --no-chat-temp"):
        ChatFormat(letters(TEMPLATE), apply_template=False, arguments={"enable_thinking": True})
    with pytest.raises(ValueError, match="^the chat template cannot be read: "):
        ChatFormat(letters("{% if %}"), arguments={"enable_thinking": True})


def test_a_template_reads_the_date_that_it_is_given():
    arguments = {"with_date": True}
    chat_format = ChatFormat(letters(TEMPLATE), arguments=arguments, date=datetime(2024, 2, 29, 12, 30))
    assert written(chat_format) == "!q29 Feb 2024 12:30"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
def test_a_folder_without_a_tokenizer(tmp_path, model_type):
    shape = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | shape))
    with pytest.raises(ValueError, match=r"^--checkpoint .*: there is no tokenizer in the folder") as refused:
        load_tokenizer(tmp_path, "--checkpoint")
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_cannot_be_read(tmp_path):
    letters(None).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, "--checkpoint").get_vocab()["a"] == ord("a")
    path: Path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^--checkpoint .*: its tokenizer cannot be loaded: .") as refused:
        load_tokenizer(tmp_path, "--checkpoint")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"a": }', "not JSON: Expecting value at column 7"),
        ("[1]", "must be a JSON object, it is a list"),
        ("enable_thinking", "not JSON: Expecting value at column 1"),
        ("{" * 10**5, "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"a": ' * 10**5, "nested too deep to be read"),
    ],
)
def test_the_flag_takes_a_json_object(given, message, capsys):
    parser = add_vespo_arguments(argparse.ArgumentParser())
    assert parser.parse_args([]).chat_template_arguments == {}
    right = ["--chat-template-arguments", '{"enable_thinking": false}']
    assert parser.parse_args(right).chat_template_arguments == {"enable_thinking": False}
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--chat-template-arguments", given])
    assert capsys.readouterr().err.endswith(f"{message}\n")
