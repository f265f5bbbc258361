"""Teachers on the command line: whom they teach, and what contradicts them."""

import argparse
from pathlib import Path

import pytest

from megatron_vespo.arguments.distillation import DistillationSettings, Teacher, teachers_of
from megatron_vespo.arguments.parse import with_expanded_paths
from megatron_vespo.arguments.training_flags import add_vespo_arguments, check_flags
from tests.support.refusals import check_refusal


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With two teachers, `big` and `code`, in the working directory."""
    for name in ("big", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parse(folder):
    required = ["--hf-checkpoint", str(folder), "--prompt-data", "train.jsonl", "--output-dir", "out"]
    return lambda argv="": add_vespo_arguments(argparse.ArgumentParser()).parse_args(
        [*required, *argv.split()]
    )


def test_without_teachers_there_are_none(parse):
    check_flags(parse())
    settings = DistillationSettings.of(parse())
    assert settings.teachers == () and settings.num_engines == 0


def test_one_teacher_of_all_prompts(parse, folder):
    args = parse("--teacher-checkpoint big --teacher-engines 2 --reward-coefficient 0")
    check_flags(args)
    settings = DistillationSettings.of(args)
    assert settings.teachers == (Teacher(None, checkpoint=folder / "big"),)
    assert settings.num_engines == 2 and settings.reward_coefficient == 0
    assert settings.engine_size(4) == 4


def test_recorded_batches_need_no_teacher_on_this_machine(parse):
    check_flags(parse("--teacher-checkpoint elsewhere --train-from recorded"))


def test_a_teacher_alone_needs_no_group(parse):
    check_flags(parse("--teacher-checkpoint big --reward-coefficient 0 --group-size 1"))
    with pytest.raises(ValueError, match="--group-size 1: --advantage-estimator group-mean compares"):
        check_flags(parse("--teacher-checkpoint big --group-size 1"))


def test_teachers_by_source(parse, folder):
    args = parse(
        "--teacher-checkpoint math=big code=./code --teacher-url chat=http://host:80/ --teacher-tp-size 2 "
        "--teacher-key kind"
    )
    check_flags(args)
    settings = DistillationSettings.of(args)
    assert settings.teachers == (
        Teacher("math", checkpoint=folder / "big"),
        Teacher("code", checkpoint=folder / "code"),
        Teacher("chat", url="http://host:80"),
    )
    assert [teacher.name for teacher in settings.served] == ["teacher math", "teacher code"]
    assert settings.num_engines == 2 and settings.engine_size(4) == 2


def test_paths_are_expanded_behind_the_source(parse, folder, monkeypatch):
    monkeypatch.setenv("MODELS", str(folder))
    args = parse("--teacher-checkpoint math=$MODELS/big code=$MODELS/code")
    assert [teacher.checkpoint for teacher in teachers_of(args.teacher_checkpoint, None)] == [
        folder / "big",
        folder / "code",
    ]


def test_a_queued_job_gets_the_paths_expanded(folder, monkeypatch):
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["--lr", "1", "--teacher-checkpoint", "math=$MODELS/big", "code=~/step=3", "--teacher-url", "~"]
    expected = ["--teacher-checkpoint", "math=/models/big", "code=/home/me/step=3", "--teacher-url", "~"]
    assert with_expanded_paths(argv) == ["--lr", "1", *expected]
    assert with_expanded_paths(["--teacher-checkpoint=~/big"]) == ["--teacher-checkpoint=/home/me/big"]
    with pytest.raises(ValueError, match=r"--teacher-checkpoint \$NOWHERE/big: the variable NOWHERE"):
        with_expanded_paths(["--teacher-checkpoint", "math=$NOWHERE/big"])


def test_an_equals_sign_in_a_folder_or_url_names_no_source():
    assert teachers_of(["/a/step=3"], None)[0].checkpoint == Path("/a/step=3")
    assert teachers_of(None, ["http://host/x?a=b"])[0] == Teacher(None, url="http://host/x?a=b")


BIG = "--teacher-checkpoint big"


@pytest.mark.parametrize(
    "row",
    [
        ("--teacher-checkpoint nowhere", "config.json"),
        ("--teacher-checkpoint math=", "[SOURCE=]DIR"),
        ("--teacher-checkpoint =big", "[SOURCE=]DIR"),
        ("--teacher-url host:80", "http://HOST:PORT"),
        ("--teacher-checkpoint big code", "--teacher-url", "two teachers of all prompts"),
        ("--teacher-checkpoint a=big --teacher-url a=http://host:80", "source a"),
        ("--teacher-url a=http://host:80 --teacher-checkpoint big", "source a", "SOURCE="),
        (f"--distillation-coefficient 0 {BIG}", "leave the teacher out"),
        (f"--distillation-coefficient -1 {BIG}",),
        (f"--distillation-coefficient inf {BIG}",),
        (f"--reward-coefficient -0.5 {BIG}",),
        (f"--distillation-clip 0 {BIG}",),
        (f"--teacher-engines 0 {BIG}",),
        (f"--teacher-tp-size 0 {BIG}",),
        (f"--rollout-temperature 0.7 {BIG}", "temperature 1"),
        (f"--dynamic-sampling --reward-coefficient 0 {BIG}", "--reward-coefficient 0"),
        (f"--kl-coef 0.1 --reward-coefficient 0 {BIG}", "--reward-coefficient 0", "--kl-loss-coef"),
        (f"--overlong-buffer 4 --reward-coefficient 0 {BIG}", "--reward-coefficient 0", "leave it out"),
        ("--teacher-engines 2 --teacher-url http://host:80", "--teacher-checkpoint", "elsewhere"),
        ("--teacher-tp-size 2 --teacher-url http://host:80", "--teacher-checkpoint", "elsewhere"),
        (f"--teacher-key kind {BIG}", "all prompts", "SOURCE="),
        ("--teacher-engines 2", "--teacher-checkpoint"),
        ("--teacher-tp-size 2", "--teacher-checkpoint"),
        ("--teacher-key kind", "--teacher-checkpoint"),
        ("--distillation-coefficient 2", "--teacher-checkpoint"),
        ("--distillation-clip 2", "--teacher-checkpoint"),
        ("--reward-coefficient 0", "--teacher-checkpoint"),
    ],
)
def test_one_line_for_a_mistake(parse, row):
    with pytest.raises(ValueError) as error:
        check_flags(parse(row[0]))
    line = str(error.value)
    if row[0].startswith(("--teacher-checkpoint", "--teacher-url")):
        flag = row[0].split()[0]
        assert "\n" not in line and [word for word in row[1:] if word not in line] == [], line
        assert flag in line or "one teacher" in line
    else:
        check_refusal(line, *row)


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.1)])
def test_truncated_sampling_is_refused(parse, name, value):
    args = parse(BIG)
    setattr(args, f"rollout_{name}", value)
    with pytest.raises(ValueError) as error:
        check_flags(args)
    check_refusal(str(error.value), f"--rollout-{name.replace('_', '-')} {value}", "whole vocabulary")
