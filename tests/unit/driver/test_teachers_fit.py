"""Whether teachers fit the student: sources, tokenizers and vocabularies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vespo.arguments.distillation import Teacher
from megatron_vespo.data.prompts import PromptSet
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.driver.teachers import check_teachers, different_vocabulary
from tests.support.builders import make_prompt
from tests.support.engine_stub import EngineStub
from tests.support.servers import VOCAB_SIZE, write_character_tokenizer


@pytest.fixture
def student(tmp_path) -> Path:
    folder = tmp_path / "student"
    write_character_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return folder


def run_of(student: Path, *teachers: Teacher, flags: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(
        distillation=SimpleNamespace(teachers=teachers, teacher_key="data_source"),
        engines=SimpleNamespace(hf_checkpoint=student, sglang_flags=flags),
        rollout=SimpleNamespace(max_prompt_tokens=10, max_completion_tokens=20),
        trainer=SimpleNamespace(vocab_size=VOCAB_SIZE),
    )


def prompts(*sources: str | None) -> PromptSet:
    rows = [
        make_prompt(i, metadata={} if source is None else {"data_source": source})
        for i, source in enumerate(sources)
    ]
    return PromptSet(rows, 0, Path("train.jsonl"), False)


def check(student: Path, teacher: Teacher) -> list[str]:
    return check_teachers(run_of(student, teacher), load_tokenizer(student, "--hf-checkpoint"), prompts(None))


def changed_copy(student: Path, change) -> Path:
    folder = student.with_name("teacher")
    shutil.copytree(student, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_the_same_tokenizer_fits(student):
    assert check(student, Teacher(None, checkpoint=student)) == []


def test_more_tokens_than_the_students_fit(student):
    folder = changed_copy(student, lambda vocab: vocab.update({"<more>": 98}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE + 64}))
    assert check(student, Teacher(None, checkpoint=folder)) == []


def test_tokens_with_other_ids_are_refused(student):
    def swap(vocab: dict[str, int]) -> None:
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]

    folder = changed_copy(student, swap)
    with pytest.raises(ValueError) as error:
        check(student, Teacher(None, checkpoint=folder))
    line = str(error.value)
    assert str(folder) in line and "'A'" in line and "\n" not in line and "36" in line and "37" in line


def test_missing_tokens_are_refused():
    assert (
        different_vocabulary({"a": 0, "b": 1}, {"a": 0, "c": 1})
        == "token 'b', the student's 1, does not exist there"
    )
    assert different_vocabulary({"a": 0}, {"a": 0, "c": 1}) is None


def test_a_model_with_fewer_token_ids_is_refused(student):
    folder = changed_copy(student, lambda vocab: None)
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE - 1}))
    with pytest.raises(ValueError, match="it has 127 token ids, the student .* has 128"):
        check(student, Teacher(None, checkpoint=folder))


def test_a_model_that_reads_too_few_tokens_is_refused(student):
    folder = changed_copy(student, lambda vocab: None)
    tokenizer = load_tokenizer(student, "--hf-checkpoint")
    teacher = Teacher(None, checkpoint=folder)
    for positions, flags, fits in (
        (31, (), True), (30, (), False), (8, ("--context-length", "31"), True),
        (99, ("--context-length", "30"), False),
    ):  # fmt: skip
        config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": positions}
        (folder / "config.json").write_text(json.dumps(config))
        run = run_of(student, teacher, flags=flags)
        if fits:
            assert check_teachers(run, tokenizer, prompts(None)) == []
            continue
        with pytest.raises(ValueError, match="it reads at most 29 tokens, .* allow 30"):
            check_teachers(run, tokenizer, prompts(None))


def test_every_prompt_needs_a_teacher(student):
    tokenizer = load_tokenizer(student, "--hf-checkpoint")
    two = Teacher("math", checkpoint=student), Teacher("code", checkpoint=student)
    assert check_teachers(run_of(student, *two), tokenizer, prompts("math", "code", "math")) == []
    for sources, words in (
        (("math", "law"), "prompt 1 is of data_source 'law'"),
        ((None,), "prompt 0 has no"),
    ):
        with pytest.raises(ValueError) as error:
            check_teachers(run_of(student, *two), tokenizer, prompts(*sources))
        assert words in str(error.value) and "math, code" in str(error.value)


def test_a_teacher_elsewhere_is_asked(student, monkeypatch):
    class Elsewhere(EngineStub):
        def info(self):
            return answer

    monkeypatch.chdir(student)  # a folder that is no teacher's, whose config.json nobody named
    with Elsewhere() as server:
        answer = {"tokenizer_path": str(student)}
        assert check(student, Teacher(None, url=server.url)) == []
        for told in ({"tokenizer_path": "some/model"}, {"tokenizer_path": None}, {}):
            answer = told
            [line] = check(student, Teacher(None, url=server.url))
            assert server.url in line and "not compared" in line
    with pytest.raises(ValueError, match=f"--teacher-url {server.url}: /model_info did not answer"):
        check(student, Teacher(None, url=server.url))


def test_the_runs_context_length_is_not_that_of_a_teacher_elsewhere(student):
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 30}
    (student / "config.json").write_text(json.dumps(config))

    class Elsewhere(EngineStub):
        def info(self):
            return {"tokenizer_path": str(student)}

    tokenizer = load_tokenizer(student, "--hf-checkpoint")
    with Elsewhere() as server, pytest.raises(ValueError, match="it reads at most 29 tokens, .* allow 30"):
        run = run_of(student, Teacher(None, url=server.url), flags=("--context-length", "64"))
        check_teachers(run, tokenizer, prompts(None))
