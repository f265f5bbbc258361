"""~ and variables in paths, where no shell has expanded them."""

import argparse
import importlib
from pathlib import Path

import pytest

from megatron_vespo.arguments.recipe import with_recipes
from megatron_vespo.arguments.training_flags import add_vespo_arguments
from megatron_vespo.commands.evaluate.flags import _named_files
from megatron_vespo.rollout.server_arguments import parse_sglang_flags
from megatron_vespo.system.paths import expanded, expanded_flags, names_a_path, user_path


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/my own")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/run", "/home/me/run"),
        ("$HOME/run", "/home/me/run"),
        ("${SCRATCH}/run", "/scratch/my own/run"),
        ("$SCRATCH.bak/$HOME", "/scratch/my own.bak//home/me"),
        ("~root/x", "/root/x"),
        ("plain/~/x~", "plain/~/x~"),
        ("./~x", "./~x"),
        ("cost$", "cost$"),
        ("a$-b${}", "a$-b${}"),
        ("", ""),
    ],
)
def test_expanded(text, path):
    assert expanded(text) == path


@pytest.mark.parametrize("text", ["$UNSET/x", "a/${UNSET}", "$EMPTY/x"])
def test_a_variable_that_is_not_set(text):
    name = "EMPTY" if "EMPTY" in text else "UNSET"
    with pytest.raises(ValueError) as error:
        expanded(text)
    assert str(error.value) == f"{text}: the variable {name} is not set"


def test_a_user_that_there_is_not():
    with pytest.raises(ValueError) as error:
        expanded("~nobody-here/x")
    message = "~nobody-here/x: there is no user nobody-here; a file of that name is ./~nobody-here"
    assert str(error.value) == message


def test_as_argparse_says_it(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=user_path)
    assert parser.parse_args(["--x=~/a"]).x == Path("/home/me/a")
    with pytest.raises(SystemExit):
        parser.parse_args(["--x", "$UNSET/a"])
    assert capsys.readouterr().err.endswith("argument --x: $UNSET/a: the variable UNSET is not set\n")


def test_every_path_flag_of_training_is_expanded():
    actions = add_vespo_arguments(argparse.ArgumentParser())._actions
    paths = {action.option_strings[0] for action in actions if action.type is user_path}
    of_data = {"--hf-checkpoint", "--prompt-data", "--eval-data", "--reference-checkpoint"}
    of_runs = {"--output-dir", "--save-rollouts", "--train-from", "--weight-sync-folder"}
    assert paths == of_data | of_runs
    assert not [action.option_strings for action in actions if action.type is Path]


@pytest.mark.parametrize(
    "module",
    [
        "convert.command",
        "evaluate.flags",
        "check_layout.command",
        "plan.command",
        "submit.command",
        "view.options",
    ],
)  # fmt: skip
def test_no_other_command_has_a_path_that_is_taken_literally(module):
    found = importlib.import_module(f"megatron_vespo.commands.{module}")
    parsers = [getattr(found, "make_parser" if module == "evaluate.flags" else "_parser")()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
            assert action.type is not Path, action


def test_flags_in_the_middle_of_others():
    argv = ["--save", "~/a", "$HOME/b", "--lr", "$HOME", "--load=$HOME/c", "--x=~/d", "--data-path", "~"]
    assert expanded_flags(argv, names_a_path) == [
        "--save", "/home/me/a", "/home/me/b", "--lr", "$HOME", "--load=/home/me/c", "--x=~/d",
        "--data-path", "/home/me",
    ]  # fmt: skip


def test_of_sglang():
    flags, _ = parse_sglang_flags(["--sglang-tokenizer-path", "~/t", "--sglang-dtype=$HOME"])
    assert flags == ["--tokenizer-path", "/home/me/t", "--dtype", "$HOME"]


def test_a_recipes_own_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.flags").write_text("--lr 1")
    assert with_recipes(["--recipe=~/r.flags"]) == ["--lr", "1"]


def test_prompt_sets_of_an_evaluation():
    assert _named_files(["a=~/a.jsonl"]) == {"a": Path("/home/me/a.jsonl")}
