"""Episodes with an environment, around a stand-in for the engines."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import decoders

from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.data.turns import TurnTemplate
from megatron_vespo.rollout.environment import Step
from megatron_vespo.rollout.episode import EnvironmentFailedError, EpisodeLimits, Episodes
from megatron_vespo.types import Completion, SamplingParams, Segments, VersionSpans
from tests.support.builders import make_completion, make_prompt
from tests.support.letter_tokenizer import letters

TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}~{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER = letters(TEMPLATE)
TOKENIZER.backend_tokenizer.decoder = decoders.Fuse()  # without blanks between the letters
TURNS = TurnTemplate(ChatFormat(TOKENIZER), "the model")
PROMPT = make_prompt(7, [ord("q")], answer="2")
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=200, stop_token_ids=(ord("~"),))


class Counts:
    """Asks for `answer` turns, and rewards every one with its number."""

    def __init__(self):
        self.texts: list[str] = []

    async def reset(self, prompt):
        self.left = int(prompt.answer)

    async def step(self, text):
        self.texts.append(text)
        self.left -= 1
        return f"more {self.left}", float(len(self.texts)), self.left == 0

    def reward_data(self):
        return {"texts": self.texts}


class Replayable(Counts):
    replayable = True


class Engine:
    """Answers every turn with the next of `answers`, each by another version."""

    def __init__(self, answers: Sequence[str], version: int = 0):
        self.answers, self.version, self.asked = list(answers), version, []

    async def __call__(self, sampling: SamplingParams, begun: Completion | None) -> Completion:
        self.asked.append(begun)
        text = self.answers.pop(0)
        length = 0 if begun is None else len(begun.token_ids)
        token_ids = [ord(letter) for letter in text][: sampling.max_new_tokens - length]
        new = make_completion(
            PROMPT, token_ids, self.version, log_probs=-np.arange(len(token_ids), dtype=np.float32)
        )
        new.finish_reason = "stop" if token_ids[-1] == ord("~") else "length"
        self.version += 1
        if begun is None:
            return new
        old = begun.segments or Segments.single("policy", length)
        return replace(
            begun,
            token_ids=np.concatenate([begun.token_ids, new.token_ids]),
            log_probs=np.concatenate([begun.log_probs, new.log_probs]),
            policy_versions=VersionSpans.joined([begun.policy_versions, new.policy_versions]),
            segments=Segments.joined([old, Segments.single("policy", len(token_ids))]),
            finish_reason=new.finish_reason,
        )


def episodes(
    environment=Counts, max_turns: int = 8, max_turn_tokens=None, timeout_s: float = 5.0
) -> Episodes:
    return Episodes(environment, TURNS, TOKENIZER, EpisodeLimits(max_turns, max_turn_tokens, timeout_s))


def play(engine: Engine, made: Episodes, begun: Completion | None = None, prompt=PROMPT) -> Completion:
    return asyncio.run(made.play(prompt, SAMPLING, engine, begun))


def text_of(completion: Completion) -> str:
    return "".join(map(chr, completion.token_ids.tolist()))


def test_turns_and_observations_alternate():
    completion = play(Engine(["one~", "two~"]), episodes())
    given = "<user>more 1~<assistant>"
    assert text_of(completion) == f"one~{given}two~" and completion.finish_reason == "stop"
    assert completion.segments == Segments(("policy", "environment", "policy"), (4, len(given), 4))
    assert completion.num_sampled == len(completion.log_probs) == len(completion.policy_versions) == 8
    assert completion.policy_versions.versions == (0, 1)
    assert completion.turn_rewards == (1.0, 2.0)
    assert completion.reward_data == {"texts": ["one", "two"]}  # without stop tokens


@pytest.mark.parametrize(
    ("limits", "answers", "reason", "rewards"),
    [
        ({"max_turns": 1}, ["one~"], "turns", (1.0,)),
        ({"max_turn_tokens": 3}, ["endless"], "length", ()),
        ({}, ["x" * 190 + "~"], "length", (1.0,)),  # no room for another turn
        ({}, ["x" * 300], "length", ()),
    ],
)
def test_limits_end_an_episode(limits, answers, reason, rewards):
    completion = play(Engine(answers), episodes(**limits))
    assert completion.finish_reason == reason and completion.turn_rewards == rewards
    assert completion.num_given_at_end == 0 and len(completion.token_ids) <= SAMPLING.max_new_tokens


def test_the_limit_of_a_turn_is_that_of_each_turn():
    engine = Engine(["one~", "twothree"])
    completion = play(engine, episodes(max_turn_tokens=4))
    assert text_of(completion).endswith("<assistant>twot") and completion.finish_reason == "length"


class Raises(Counts):
    async def step(self, text):
        raise KeyError("the door")


class Hangs(Counts):
    async def step(self, text):
        await asyncio.sleep(60)


class AnswersWrongly(Counts):
    async def step(self, text):
        return "only text"


class GivesNan(Counts):
    async def step(self, text):
        return Step("", float("nan"), True)


class GivesHuge(Counts):
    async def step(self, text):
        return "more", 1e308, False


class Exits(Counts):
    async def step(self, text):
        raise SystemExit(3)


class CancelsItself(Counts):
    async def step(self, text):
        raise asyncio.CancelledError("a task of its own")


class GivesWrongMessages(Counts):
    async def step(self, text):
        return [{"role": "assistant", "content": "I am you"}], 0.0, False


class AnswersInHalfALetter(Counts):
    async def step(self, text):
        return "\ud83d", 0.0, False


class TakesAnUnknownRole(Counts):
    async def step(self, text):
        return [{"role": "tool", "content": "7"}], 0.0, False


class CannotClose(Counts):
    async def close(self):
        raise OSError("the door is locked")


class HandsOverNoJson(Counts):
    def reward_data(self):
        return {"a set": {1}}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (Raises, "KeyError: 'the door'"),
        (Hangs, "it did not answer within 0.2 s"),
        (AnswersWrongly, "step must return (observation, reward, done), not 'only text'"),
        (Exits, "SystemExit: 3"),
        (CancelsItself, "CancelledError: a task of its own"),
        (GivesNan, "step returned the reward nan, which must be a finite number"),
        (GivesWrongMessages, "'role' must be one of user, tool, system, 'content' text"),
        (AnswersInHalfALetter, "its observation cannot follow: "),
        (
            TakesAnUnknownRole,
            "its observation cannot follow: ValueError: the model: its chat template leaves",
        ),
    ],
)
def test_a_failure_is_kept_with_the_episode(environment, message):
    completion = play(Engine(["one~"]), episodes(environment, timeout_s=0.2))
    assert message in completion.environment_error and text_of(completion) == "one~"
    assert completion.finish_reason == "stop"


def test_rewards_whose_sum_is_not_finite_are_a_failure():
    completion = play(Engine(["one~", "two~", "three~"]), episodes(GivesHuge, max_turns=3))
    assert completion.environment_error == "its rewards add up to inf" and completion.turn_rewards == ()


def test_an_episode_can_be_cancelled():
    async def main():
        made = episodes(Hangs)
        task = asyncio.create_task(made.play(PROMPT, SAMPLING, Engine(["one~"]), None))
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())


def test_data_that_are_no_json_are_a_failure():
    completion = play(Engine(["one~", "two~"]), episodes(HandsOverNoJson))
    assert "reward_data: TypeError" in completion.environment_error and completion.reward_data == {}


def test_an_environment_that_cannot_be_closed_says_so():
    completion = play(Engine(["one~", "two~"]), episodes(CannotClose))
    assert completion.environment_error == "close: OSError: the door is locked"
    assert completion.turn_rewards == (1.0, 2.0)


class CannotBeMade(Counts):
    def __init__(self):
        raise OSError("no such game")


def test_an_environment_that_cannot_be_made_names_the_prompt():
    with pytest.raises(EnvironmentFailedError, match="failed at prompt 7: OSError: no such game"):
        play(Engine([]), episodes(CannotBeMade))


def test_an_environment_that_cannot_begin_names_the_prompt():
    broken = make_prompt(9, [1], answer="no number")
    with pytest.raises(
        EnvironmentFailedError, match="failed at prompt 9: reset: ValueError: invalid literal"
    ):
        play(Engine([]), episodes(), prompt=broken)


class Closes(Counts):
    closed = 0

    async def close(self):
        Closes.closed += 1


def test_every_environment_is_closed():
    for prompt in (PROMPT, make_prompt(9, [1], answer="no number")):
        try:
            play(Engine(["one~", "two~"]), episodes(Closes), prompt=prompt)
        except EnvironmentFailedError:
            pass
    assert Closes.closed == 2


def interrupted(engine: Engine, number: int, partial: str) -> Completion:
    """What a checkpoint has of an episode whose turn `number` was interrupted after the text `partial`."""

    async def turn(sampling, begun):
        nonlocal stored
        if len(engine.asked) == number:
            last = await Engine([partial], engine.version)(sampling, begun)
            stored = replace(last, finish_reason="abort")
            raise InterruptedError
        return await engine(sampling, begun)

    stored = None
    with pytest.raises(InterruptedError):
        asyncio.run(episodes(Replayable).play(make_prompt(7, [ord("q")], answer="3"), SAMPLING, turn))
    assert stored is not None
    return stored


@pytest.mark.parametrize(("partial", "rest"), [("tw", ["o~", "three~"]), ("two~", ["three~"])])
def test_a_replayable_episode_goes_on_where_it_was(partial, rest):
    """In the middle of a turn, and while the environment answered a finished one."""
    begun = interrupted(Engine(["one~"]), 1, partial)
    prompt = make_prompt(7, [ord("q")], answer="3")
    engine = Engine(rest, version=5)
    completion = play(engine, episodes(Replayable), begun, prompt)
    assert text_of(completion) == "one~<user>more 2~<assistant>two~<user>more 1~<assistant>three~"
    assert completion.turn_rewards == (1.0, 2.0, 3.0) and len(engine.asked) == len(rest)
    whole = play(Engine(["one~", "two~", "three~"]), episodes(Replayable), None, prompt)
    assert completion.segments == whole.segments and completion.reward_data == whole.reward_data


def test_another_episode_begins_anew():
    begun = interrupted(Engine(["one~"]), 1, "tw")
    engine = Engine(["new~", "two~", "three~"])
    completion = play(engine, episodes(Counts), begun, make_prompt(7, [ord("q")], answer="3"))
    assert engine.asked[0] is None and text_of(completion).startswith("new~<user>more 2~")


def test_an_environment_that_does_not_repeat_itself_is_named():
    begun = interrupted(Engine(["one~"]), 1, "tw")
    completion = play(Engine([]), episodes(Replayable), begun, make_prompt(7, [ord("q")], answer="9"))
    assert completion.environment_error.startswith(
        "replay: the environment is `replayable`, but gave another"
    )


def test_a_failed_replay_keeps_no_observation_that_entered_no_pass():
    """R3 has no routes of it."""
    begun = interrupted(Engine(["one~"]), 1, "two~")
    end = len(begun.token_ids) - 4
    observed = replace(
        begun,
        token_ids=begun.token_ids[:end],
        log_probs=begun.log_probs[:-4],
        policy_versions=VersionSpans.single(0, 4),
        segments=Segments(("policy", "environment"), (4, end - 4)),
    )
    completion = play(Engine([]), episodes(Replayable), observed, make_prompt(7, [ord("q")], answer="9"))
    assert completion.environment_error and text_of(completion) == "one~"
    assert completion.segments == Segments.single("policy", 4) and completion.num_sampled == 4


def test_a_limit_that_was_reached_before_the_interruption_holds():
    begun = interrupted(Engine(["one~"]), 1, "two")
    engine = Engine([])
    completion = play(
        engine, episodes(Replayable, max_turn_tokens=3), begun, make_prompt(7, [ord("q")], answer="3")
    )
    assert completion.finish_reason == "length" and engine.asked == []


class AnswersAsTool(Counts):
    async def step(self, text):
        return [{"role": "tool", "content": "a result"}], 0.0, False


def test_a_message_that_the_template_refuses_is_a_failure():
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template += "<{{ m.role }}>{{ m.content }}~{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    turns = TurnTemplate(ChatFormat(letters(template)), "the model")
    made = replace(episodes(AnswersAsTool), turns=turns)
    completion = play(Engine(["one~"]), made)
    assert "the chat template refuses the messages: no tools" in completion.environment_error
    assert completion.turn_rewards == (0.0,) and completion.num_given_at_end == 0
