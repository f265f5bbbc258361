"""Files of flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vespo.arguments.recipe import read_recipe, recipe_files, with_recipes


def write(folder, text: str | bytes):
    path = folder / "run.flags"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_flags_comments_and_quotes(tmp_path):
    text = "# a run\n--lr 1e-6 --bf16  # the paper's\n\n--vespo-positive 2 3\n--answer-pattern '#### (.+)'\n"
    assert read_recipe(write(tmp_path, text)) == [
        "--lr", "1e-6", "--bf16", "--vespo-positive", "2", "3", "--answer-pattern", "#### (.+)"
    ]  # fmt: skip


def test_a_recipe_stands_where_it_is_named(tmp_path):
    path = write(tmp_path, "--lr 1e-6")
    for spelling in (["--recipe", str(path)], [f"--recipe={path}"]):
        assert with_recipes(["--bf16", *spelling, "--lr", "2"]) == ["--bf16", "--lr", "1e-6", "--lr", "2"]
    assert with_recipes(["--lr", "1"]) == ["--lr", "1"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must begin with a flag, has none"),
        ("lr 1", "must begin with a flag, has ['lr']"),
        ("--lr '1", "line 1: No closing quotation"),
        ("--bf16\n\n# it's\n--x 'a\nb'\n--lr '1\n--y\n# z", "line 6: No closing quotation"),
        ("--bf16\n--lr 1 \\", "line 2: No escaped character"),
        (b"\x7fELF\xff\xfe", "not a text file of flags"),
        (b"--lr\0 1", "not a text file of flags"),
        ("--lr 1 --recipe other", "--recipe inside a recipe"),
    ],
)
def test_mistakes_name_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}: ") and message in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_recipe(tmp_path / "none.flags")
    with pytest.raises(ValueError, match="the file is missing"):
        with_recipes(["--recipe"])


def test_the_files_that_a_command_line_names():
    assert recipe_files(["train", "--recipe", "a.flags", "--lr", "1", "--recipe=b.flags"]) == [
        Path("a.flags"),
        Path("b.flags"),
    ]
    assert recipe_files(["train", "--lr", "1"]) == []
