"""Whether a run that is resumed has the prompts that it began with."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from megatron_vespo.checkpoints.names import PROMPTS_NAME, TRACKER_NAME
from megatron_vespo.checkpoints.prompt_record import PromptRecord, digest, read_record
from megatron_vespo.checkpoints.run_folder import resumed_save
from megatron_vespo.driver import services
from megatron_vespo.driver.services import Task, load_task
from megatron_vespo.types import Prompt, SamplingParams
from tests.support.builders import make_prompt
from tests.support.letter_tokenizer import letters
from tests.support.saved_steps import complete
from tests.support.settings import flat_settings

DATA = "--prompt-data b.jsonl"
DATE = datetime(2026, 2, 28, 23, 59, 30)
PROMPT_LIST = [Prompt(i, [i, i + 1], f"answer {i}", f"question {i}", {"level": i}) for i in range(5)]


def difference(prompts: list[Prompt], seed: int = 1) -> str:
    before = PromptRecord.of(PROMPT_LIST, 1, DATE)
    with pytest.raises(ValueError) as refused:
        before.check_same(PromptRecord.of(prompts, seed, DATE), Path("ck/iter_0000002"), Path("b.jsonl"))
    start = "--load ck/iter_0000002 is of a run with other prompts: "
    end = "; give the same again, or begin a new run with its policy (megatron-vespo convert megatron-to-hf)"
    assert str(refused.value).startswith(start) and str(refused.value).endswith(end)
    return str(refused.value).removeprefix(start).removesuffix(end)


def changed(index: int, **fields) -> list[Prompt]:
    return [replace(p, **fields) if p.prompt_id == index else p for p in PROMPT_LIST]


def test_what_differs_is_said():
    assert difference(PROMPT_LIST[:3]) == f"{DATA} has 3 within --max-prompt-tokens, there were 5"
    assert difference(changed(2, answer="x")) == f"{DATA}: row 3 is another one (1 of 5 are)"
    assert difference(changed(4, text="x")) == f"{DATA}: row 5 is another one (1 of 5 are)"
    assert difference(changed(0, prompt_id=9)) == f"{DATA}: row 10 is another one (1 of 5 are)"
    assert difference(PROMPT_LIST[::-1]) == f"{DATA}: row 5 is another one (4 of 5 are)"
    assert difference(changed(3, token_ids=[3])) == (
        f"{DATA}: row 4 has the same question and answer but other tokens (1 of 5 have): another "
        "tokenizer, chat template, --chat-template-arguments or system message"
    )
    assert difference(PROMPT_LIST, seed=2) == "--seed orders them, it was 1 and is 2"


def test_the_same_prompts_pass_and_come_back_from_a_file(tmp_path):
    odd = [*PROMPT_LIST, Prompt(7, [1], "half \ud83d", "question", {})]
    (tmp_path / PROMPTS_NAME).write_bytes(PromptRecord.of(odd, -3, DATE).encode())
    again = [replace(prompt, metadata={"other": 1}) for prompt in odd]
    stored = read_record(tmp_path)
    now = PromptRecord.of(again, -3, DATE + timedelta(days=1))
    assert stored.check_same(now, tmp_path, Path("elsewhere.jsonl")) == []
    assert stored.date == DATE
    assert read_record(tmp_path / "nowhere") is None
    (tmp_path / PROMPTS_NAME).write_bytes(b"PK and no more")
    with pytest.raises(ValueError, match=r"^--load .*/prompts.npz: broken: ") as refused:
        read_record(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_digest_tells_where_prompts_end():
    one, other = ([make_prompt(0, ids) for ids in lists] for lists in ([[1], [2, 1, 3]], [[1, 2], [1, 3]]))
    assert digest(one) != digest(other)
    assert digest(one) == digest([replace(prompt, answer="x") for prompt in one])


def test_the_folder_that_is_resumed(tmp_path):
    assert resumed_save(tmp_path) is None
    complete(tmp_path, 2, 4)
    tracker = tmp_path / TRACKER_NAME
    for word, found in (("4", "iter_0000004"), ("2", "iter_0000002"), ("", "iter_0000004")):
        tracker.write_text(word)
        assert resumed_save(tmp_path).name == found
    assert resumed_save(tmp_path, 2).name == "iter_0000002"
    tracker.write_text("release")  # converted weights
    assert resumed_save(tmp_path) is None


class Run:
    """A model folder whose template writes the time, prompts, and checkpoints; `task` loads as a run does."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        self.tokenizer("{{ strftime_now('%d %H:%M:%S') }} {{ messages[-1].content }}")
        self.questions = [{"question": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(6)]

    def tokenizer(self, template: str) -> None:
        letters(template).save_pretrained(self.model)
        (self.model / "config.json").write_text('{"architectures": ["AnotherFamily"]}')
        (self.model / "generation_config.json").write_text('{"eos_token_id": 33}')

    def write(self, name: str, rows: list[dict]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def task(self, **changed) -> Task:
        args = flat_settings(
            hf_checkpoint=self.model, prompt_data=self.write("train.jsonl", self.questions),
            eval_data=None, prompt_key="question", answer_key="answer", answer_pattern=None,
            apply_chat_template=True,
            chat_template_arguments={}, max_prompt_tokens=64, overlong_prompts="skip", vocab_size=128, seed=1,
            eval_prompt_key=None, eval_answer_key=None, eval_answer_pattern=None, eval_prompts=9,
            reward_function="math", generate_function=None, environment=None, rollout_temperature=1.0,
            max_completion_tokens=8, sglang_flags=(),
            sampling=lambda stops, flags: SamplingParams(1.0, 8, stops), train_from=None, rollout_only=False,
            ckpt_step=None, load=str(self.folder / "saved"),
        )  # fmt: skip
        return load_task(flat_settings(**vars(args.values) | changed))

    def save(self, task: Task) -> None:
        complete(self.folder / "saved", 4)
        if task.record is not None:
            (self.folder / "saved/iter_0000004" / PROMPTS_NAME).write_bytes(task.record)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


class Clock(datetime):
    today = DATE

    @classmethod
    def now(cls, tz=None):
        return cls.today


@pytest.fixture
def clock(monkeypatch) -> type[Clock]:
    monkeypatch.setattr(services, "datetime", Clock)
    monkeypatch.setattr(Clock, "today", DATE)
    return Clock


def tokens(task: Task) -> list[str]:
    return ["".join(map(chr, prompt.token_ids)) for prompt in task.prompts.prompts]


def test_a_run_has_one_date_however_often_it_is_resumed(run, clock):
    first = run.task()
    assert tokens(first)[:2] == ["28 23:59:30 0 + 1 = ?", "28 23:59:30 1 + 1 = ?"]
    assert first.remarks == []
    run.save(first)
    clock.today += timedelta(minutes=1)
    again = run.task()
    assert tokens(again) == tokens(first) and again.record == first.record
    assert tokens(run.task(load=None))[0].startswith("01 00:00:30")  # another run


def test_held_out_prompts_have_the_date_of_the_run_and_keys_of_their_own(run, clock):
    path = run.write("heldout.jsonl", [{"problem": "2 + 2 = ?", "solution": "thus #4"}])
    keys = {"eval_prompt_key": "problem", "eval_answer_key": "solution"}
    run.save(run.task())
    clock.today += timedelta(days=1)
    (prompt,) = run.task(eval_data=path, eval_answer_pattern="#(.)", **keys).eval_prompts
    assert "".join(map(chr, prompt.token_ids)) == "28 23:59:30 2 + 2 = ?" and prompt.answer == "4"
    # training's pattern, where there is none of their own, and one that takes all
    train = run.write("train2.jsonl", [{"question": "q", "answer": "x#1"}])
    given = {"eval_data": path, "prompt_data": train, "answer_pattern": "#(.)", "load": None} | keys
    assert run.task(**given).eval_prompts[0].answer == "4"
    assert run.task(**given, eval_answer_pattern="(?s)(.*)").eval_prompts[0].answer == "thus #4"
    with pytest.raises(ValueError, match=r"no key 'question' \(--eval-prompt-key question\)"):
        run.task(eval_data=path)


def test_other_held_out_prompts_are_said(run):
    rows = [{"question": "2 + 2 = ?", "answer": "4"}, {"question": "2 + 3 = ?", "answer": "5"}]
    path = run.write("heldout.jsonl", rows)
    run.save(run.task(eval_data=path))
    assert run.task(eval_data=path).remarks == run.task().remarks == []
    (remark,) = run.task(eval_data=path, eval_prompts=1).remarks
    assert remark.startswith("the held-out prompts are others than before ")


def test_other_data_is_refused_and_another_place_is_not(run):
    run.save(run.task())
    run.task(prompt_data=run.write("moved.jsonl", run.questions))
    with pytest.raises(ValueError, match=r"train.jsonl has 5 within --max-prompt-tokens, there were 6"):
        run.questions = run.questions[1:]
        run.task()
    run.task(rollout_only=True)  # begins anew
    run.task(load=None)


def test_another_template_or_seed_is_refused(run):
    run.save(run.task())
    with pytest.raises(ValueError, match="--seed orders them, it was 1 and is 2"):
        run.task(seed=2)
    run.tokenizer("{{ messages[-1].content }}")
    with pytest.raises(ValueError, match=r"row 1 has the same question and answer but other tokens \(6 of 6"):
        run.task()


def test_a_checkpoint_without_the_record_goes_on_and_says_so(run):
    run.save(Task())
    folder = run.folder / "saved/iter_0000004"
    assert run.task().remarks == [f"{folder} does not say which prompts its run has: they are not compared"]
