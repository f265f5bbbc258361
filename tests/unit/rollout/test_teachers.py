"""Teachers of our own: which one is asked what, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from megatron_vespo.rollout import router, teachers
from megatron_vespo.rollout.generate_reply import GenerateReplyError
from megatron_vespo.rollout.router import CollectError, LostRequests
from megatron_vespo.rollout.score_reply import parse_score_reply
from megatron_vespo.rollout.teacher_flags import teacher_flags
from megatron_vespo.rollout.teachers import TeacherEngines, Teachers, prompt_without_teacher
from megatron_vespo.system.http import EngineRequestError
from megatron_vespo.types import TOKEN_ID
from tests.support.builders import make_completion, make_prompt, make_segments
from tests.support.engine_stub import EngineStub


class Teacher(EngineStub):
    """The log-prob of token t is -t / `divisor`; the first `breaking` requests lose their connection."""

    def __init__(self, divisor: float = 10.0, breaking: int = 0):
        super().__init__()
        self.divisor, self.breaking, self.hides = divisor, breaking, False

    async def respond(self, path, body):
        if self.breaking > 0:
            self.breaking -= 1
            raise ConnectionResetError
        assert body["sampling_params"] == {"max_new_tokens": 0} and body["return_logprob"] is True
        entries = [[-token / self.divisor, token, None] for token in body["input_ids"]]
        entries = entries[body["logprob_start_len"] :]
        entries[0][0] = None
        if self.hides:
            entries[-1][0] = None  # as SGLang writes NaN and infinities
        return {"meta_info": {"input_token_logprobs": entries}}


def engines(stub: EngineStub, source: str | None = None, **fields) -> TeacherEngines:
    name = "teacher" if source is None else f"teacher {source}"
    return TeacherEngines(name, source, [stub.url], fields.pop("lost", LostRequests()), **fields)


def ask(*found: TeacherEngines, timeout_s: float = 10.0, max_attempts: int = 3) -> Teachers:
    return Teachers(found, "data_source", timeout_s=timeout_s, max_attempts=max_attempts)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(router, "AVOID_S", 0.1)
    monkeypatch.setattr(router, "POLL_S", 0.02)
    monkeypatch.setattr(teachers, "CHECK_INTERVAL_S", 0.02)


def test_the_scores_are_those_of_the_response():
    prompt, done = make_prompt(1, [5, 6, 7]), []
    completions = [make_completion(prompt, [8, 9]), make_completion(prompt, [4])]
    with Teacher() as teacher:
        ask(engines(teacher)).score(completions, lambda *progress: done.append(progress))
    assert completions[0].teacher_log_probs == pytest.approx([-0.8, -0.9])
    assert completions[1].teacher_log_probs == pytest.approx([-0.4])
    assert completions[0].teacher_log_probs.dtype == np.float32
    assert done == [(1, 2), (2, 2)]
    assert sorted(body["logprob_start_len"] for body in teacher.requests) == [2, 2]


def test_given_tokens_have_no_score():
    """Two sampled, three given, one sampled, two given: the last ones are not even sent."""
    completion = make_completion(
        make_prompt(0, [3]), [11, 12, 13, 14, 15, 16, 17, 18], segments=make_segments(2, 3, 1, 2)
    )
    with Teacher() as teacher:
        ask(engines(teacher)).score([completion])
    assert completion.teacher_log_probs == pytest.approx([-1.1, -1.2, -1.6])
    assert teacher.requests[0]["input_ids"] == [3, 11, 12, 13, 14, 15, 16]


def test_each_source_has_its_teacher():
    prompts = [make_prompt(i, metadata={"data_source": s}) for i, s in enumerate(["code", "math", "code"])]
    completions = [make_completion(prompt, [10]) for prompt in prompts]
    with Teacher(10) as of_math, Teacher(5) as of_code:
        ask(engines(of_math, "math"), engines(of_code, "code")).score(completions)
    assert [float(c.teacher_log_probs[0]) for c in completions] == [-2.0, -1.0, -2.0]
    sources = ["math", "code"]
    assert prompt_without_teacher(prompts, sources, "data_source") is None
    assert prompt_without_teacher(prompts, ["code"], "data_source") is prompts[1]
    assert prompt_without_teacher(prompts, sources, "kind") is prompts[0]
    assert prompt_without_teacher(prompts, [None], "kind") is None


def test_a_prompt_without_a_teacher_has_one_line():
    """A generate function may return another prompt than it was given."""
    with Teacher() as teacher, pytest.raises(CollectError) as error:
        ask(engines(teacher, "math")).score([make_completion(make_prompt(7), [5])])
    assert str(error.value) == "prompt 7 has no teacher: its 'data_source' is None"


def test_scores_of_a_checkpoint_are_kept():
    completion = make_completion(tokens=[5], teacher_log_probs=np.array([-3.0], np.float32))
    with Teacher() as teacher:
        ask(engines(teacher)).score([completion])
    assert completion.teacher_log_probs == [-3.0] and not teacher.requests


def test_a_lost_connection_is_tried_again():
    lost = LostRequests()
    completion = make_completion(tokens=[5])
    with Teacher(breaking=2) as teacher:
        ask(engines(teacher, lost=lost)).score([completion])
    assert completion.teacher_log_probs == pytest.approx([-0.5]) and lost.number == 2


def test_a_teacher_that_is_lost_for_good_has_one_line():
    with Teacher(breaking=9) as teacher, pytest.raises(CollectError) as error:
        ask(engines(teacher), max_attempts=2).score([make_completion(make_prompt(7), [5])])
    line = str(error.value)
    assert "scoring of prompt 7 by teacher" in line and "2 engines in a row" in line and "\n" not in line


def test_nobody_waits_for_a_teacher_that_nobody_starts_again():
    """While no engine serves, requests wait; `check` ends that."""

    def check() -> None:
        raise EngineRequestError("http://x", "/health", None, "gone")

    gone = TeacherEngines("teacher", None, [None], LostRequests(), check)
    with pytest.raises(EngineRequestError, match="gone"):
        ask(gone, timeout_s=30.0).score([make_completion(tokens=[5])])


def test_requests_wait_for_an_engine_that_is_started_again():
    urls: list[str | None] = [None]
    with Teacher() as teacher:
        threading.Timer(0.3, lambda: urls.__setitem__(0, teacher.url)).start()
        completion = make_completion(tokens=[5])
        ask(TeacherEngines("teacher", None, urls, LostRequests())).score([completion])
    assert completion.teacher_log_probs == pytest.approx([-0.5])


def test_a_score_that_is_not_finite_is_refused():
    with Teacher() as teacher:
        teacher.hides = True
        completion = make_completion(make_prompt(3), [5, 6])
        with pytest.raises(GenerateReplyError, match="prompt 3 .*log-prob nan of response token 1"):
            ask(engines(teacher)).score([completion])
    assert completion.teacher_log_probs is None


def test_the_last_id_of_a_vocabulary_is_reported_as_0():
    """By SGLang 0.5.23, with its own log-prob; any other difference is one."""

    def reply(*tokens: int) -> bytes:
        entries = ", ".join(f"[-{token + 1}, {token}, null]" for token in tokens)
        return f'{{"meta_info": {{"input_token_logprobs": [[null, 1, null], {entries}]}}}}'.encode()

    sent = np.array([5, 127, 0, 127], TOKEN_ID)
    assert parse_score_reply(reply(5, 0, 0, 0), sent, "x").tolist() == [-6.0, -1.0, -1.0, -1.0]
    for wrong in ((0, 0, 0, 0), (5, 1, 0, 1), (5, 127, 0, 126)):
        with pytest.raises(GenerateReplyError, match="not of the 4 that were sent"):
            parse_score_reply(reply(*wrong), sent, "x")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{", "not a reply"),
        (b'{"meta_info": {}}', "not a reply"),
        (b'{"meta_info": {"input_token_logprobs": [[null, 1, null], [-1.0, 4, null]]}}', "not of the 2"),
        (
            b'{"meta_info": {"input_token_logprobs": [[null, 1, null], [-1.0, 5, null], [0.5, 6, null]]}}',
            "log-prob 0.5 of response token 1",
        ),
    ],
)
def test_replies_that_are_no_scores(body, why):
    with pytest.raises(GenerateReplyError, match=f"^engine x: .*{why}"):
        parse_score_reply(body, np.array([5, 6], TOKEN_ID), "engine x")


def test_flags_of_the_policys_layout_are_not_the_teachers():
    flags = "--tp-size 2 --ep-size 2 --context-length 64 --quantization fp8 --disable-radix-cache".split()
    assert teacher_flags(flags, 4) == ["--context-length", "64", "--disable-radix-cache", "--tp-size", "4"]


def test_several_scores_at_once_inside_a_loop():
    """As the background thread does it."""

    async def main(teacher: Teacher) -> list[float]:
        groups = [[make_completion(make_prompt(i), [i, 5])] for i in range(6)]
        async with ask(engines(teacher)).connect() as scoring:
            await asyncio.gather(*(scoring.score(group) for group in groups))
        return [float(group[0].teacher_log_probs[0]) for group in groups]

    with Teacher() as teacher:
        assert asyncio.run(main(teacher)) == pytest.approx([-i / 10 for i in range(6)])
