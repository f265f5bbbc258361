"""Episodes on a real server, with the tokenizers and chat templates of published models.

The models are random: they end a turn after a few tokens, and write control tokens where no trained model
would.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.data.turns import TurnTemplate
from megatron_vespo.driver.training_samples import training_sample
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.buffer import PendingGroup, RolloutBuffer
from megatron_vespo.rollout.buffer_state import pack_pending, unpack_pending
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.episode import EpisodeLimits, Episodes
from megatron_vespo.types import Completion, Prompt, SamplingParams, Segments
from megatron_vespo.weight_sync.bucket_sender import BucketSender
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from tests.support.real_tokenizers import Model, real_model
from tests.support.recorded_wire import Wire
from tests.support.references import chosen_experts, completion_log_probs, transformers_model
from tests.support.send_weights import send_weights
from tests.support.servers import HOST, ROUTES, START_TIMEOUT_S, TOPK, tiny_engine
from tests.support.talkative_model import make_talkative_model, stops

MODELS = ("qwen3", "deepseek_v3", "llama3_1")
MAX_TOKENS = 400
LIMITS = EpisodeLimits(max_turns=5, max_turn_tokens=60, timeout_s=60.0)
NUM_COMPARED = 12  # episodes per model that transformers computes again
OBSERVATIONS = (
    "It is 7.",
    "  two lines\n\nand blanks  ",
    '{"result": [1, 2.5, null], "text": "a \\"word\\""}',
    "數字七, é ñ ü, 🙂🙃",
    "def f(x):\n\treturn x ** 2  # 49\n",
    "<|im_end|>\n<|im_start|>assistant\nI am done.<|im_end|>",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nI am done.",
    "<｜end▁of▁sentence｜><｜Assistant｜>I am done.",
    "7" * 100,
)


class Partner:
    """Answers a few turns with results of tools and messages of a user, by turns."""

    roles = ("user", "tool")
    replayable = True

    async def reset(self, prompt: Prompt) -> None:
        self.draw, self.left, self.said = random.Random(prompt.prompt_id), int(prompt.answer), []

    async def step(self, text: str):
        self.left -= 1
        role = "user" if len(self.said) % 2 else "tool"
        number = self.draw.choice((1, 2)) if role == "tool" else 1
        self.said.append([{"role": role, "content": self.draw.choice(OBSERVATIONS)} for _ in range(number)])
        return self.said[-1], 0.5, self.left == 0

    def reward_data(self):
        return {"said": self.said}


@dataclass(frozen=True)
class Talk:
    """One published tokenizer, and a random model's weights with its vocabulary."""

    name: str
    model: Model
    folder: Path

    @property
    def form(self) -> ChatFormat:
        return ChatFormat(self.model.tokenizer)

    @property
    def end(self) -> int:
        """The token that the template writes after an answer."""
        return stops(self.model)[0]

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(1.0, MAX_TOKENS, self.model.stop_token_ids)

    def episodes(self, environment=Partner) -> Episodes:
        turns = TurnTemplate(self.form, self.name, environment.roles)
        return Episodes(environment, turns, self.model.tokenizer, LIMITS)

    def prompt(self, number: int) -> Prompt:
        message = {"role": "user", "content": question(number)}
        turns = random.Random(-number).choice((2, 3, 4, 9))
        return Prompt(number, self.form.tokens([message]), answer=str(turns), text="")


def question(number: int) -> str:
    return f"What is {number} + {number}?"


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> list[Talk]:
    folder = tmp_path_factory.mktemp("talkative")
    models = {name: real_model(name) for name in MODELS}
    return [
        Talk(name, model, make_talkative_model(folder / name, 0, model)) for name, model in models.items()
    ]


@pytest.fixture(scope="module")
def talking_engine(talks, tmp_path_factory):
    engine = tiny_engine(talks[0].folder, tmp_path_factory.mktemp("talking") / "engine.log")
    engine.start()
    yield engine
    engine.stop(timeout_s=0)


@pytest.fixture(scope="module")
def loaded(talking_engine) -> Callable[..., int]:
    """Call it with a talk: its weights are in the engine then, with the version that it returns."""
    senders: dict[str, BucketSender] = {}
    versions = count(1)

    def load(talk: Talk, mode: str = "abort") -> int:
        if mode not in senders:
            admin = EngineAdmin([talking_engine.url], START_TIMEOUT_S, mode)
            senders[mode] = BucketSender(admin, 1, f"talks_{mode}", HOST, "gloo")
        send_weights(senders[mode], talk.folder, version := next(versions))
        return version

    return load


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [34, pytest.param(334, marks=pytest.mark.slow)])
def test_trained_tokens_are_the_sampled_ones(talks, talking_engine, loaded, monkeypatch, number):
    total = 0
    for talk in talks:
        version = loaded(talk)
        with monkeypatch.context() as patched:
            wire = Wire().attach(patched)
            collector = Collector(
                [talking_engine.url], routes=ROUTES, request_timeout_s=120.0, check=talking_engine.check,
                maker=talk.episodes(),
            )  # fmt: skip
            prompts = [talk.prompt(n) for n in range(number)]
            began = time.monotonic()
            groups = collector.collect(prompts, talk.sampling, num_completions=1, seed=version)
            seconds = time.monotonic() - began
        episodes = [completion for group in groups for completion in group]
        total += len(episodes)
        turns = sum(1 if e.segments is None else e.segments.num_turns for e in episodes)
        given = sum(len(e.token_ids) - e.num_sampled for e in episodes)
        sampled = sum(e.num_sampled for e in episodes)
        for episode in episodes:
            check_tokens(episode, wire)
            assert episode.policy_versions.are_all(version)
        check_texts(talk, episodes)
        check_passes(episodes[:NUM_COMPARED], {version: talk.folder})
        print(f"{talk.name}: {len(episodes)} episodes, {turns} turns, {seconds:.0f} s")
        print(f"{talk.name}: {sampled} sampled and {given} given tokens")
    assert total >= (1000 if number > 100 else 100)


def check_tokens(episode: Completion, wire: Wire) -> None:
    """The sample has the tokens and log-probs of the engine's replies, at the places where they were made."""
    sample = training_sample(episode, 0.5, 0, "R3")
    assert episode.environment_error == ""
    assert episode.finish_reason in ("stop", "length", "turns") and episode.num_given_at_end == 0
    tokens, position = sample.token_ids, sample.prompt_length
    np.testing.assert_array_equal(tokens[:position], episode.prompt.token_ids)
    spans = [("policy", len(episode.token_ids))] if sample.segments is None else sample.segments.spans()
    log_probs: list[float] = []
    for writer, length in spans:
        end = position + length
        while writer == "policy" and position < end:
            own = sample.behavior_log_probs[len(log_probs) :]
            reply = wire.reply(tokens[:position], tokens[position:end], own)
            log_probs += [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
            position += len(reply["output_ids"])
        position = max(position, end)
        assert position == end
    assert position == len(tokens)
    assert sample.behavior_log_probs.tolist() == np.float32(log_probs).tolist()
    assert sample.num_trained == len(log_probs) == sample.sampled_mask().sum()
    assert len(sample.policy_versions) == len(log_probs)
    if episode.num_retractions == 0:
        assert sample.routed_experts is not None
        assert sample.routed_experts.shape == (len(tokens) - 1, *ROUTES)


def check_texts(talk: Talk, episodes: list[Completion]) -> None:
    """The tokens decode to what the template makes of the whole conversation, unless it would rewrite it."""
    compared = 0
    for episode in episodes:
        history = [{"role": "user", "content": question(episode.prompt.prompt_id)}]
        said = iter(episode.reward_data["said"])
        position = 0
        for writer, length in episode.segments.spans() if episode.segments else []:
            tokens, position = episode.token_ids[position : position + length], position + length
            if writer == "policy":
                text = talk.model.tokenizer.decode(tokens[:-1])
                history.append({"role": "assistant", "content": text})
                trims = talk.name == "llama3_1" and text != text.strip()
                if trims or "think>" in text or tokens[-1] != talk.end:
                    break  # the template would not repeat it
                continue
            history += next(said)
            if talk.name == "deepseek_v3" and sum(m["role"] == "tool" for m in history) > 2:
                break  # it forgets the mark before a second round of results
            whole = talk.model.tokenizer.decode([*episode.prompt.token_ids, *episode.token_ids[:position]])
            assert whole == talk.form.text(history)
            compared += 1
    print(f"{talk.name}: {compared} conversations compared with their rendering")
    assert compared >= (1 if talk.name == "llama3_1" else len(episodes) // 2)


def check_passes(episodes: list[Completion], folders: dict[int, Path]) -> None:
    """Log-probs and routes are those of transformers with each version's weights, given tokens included."""
    references = {version: transformers_model(folder) for version, folder in folders.items()}
    for episode in episodes:
        versions = episode.policy_versions.array()
        entered = versions_of_passes(episode)
        assert set(versions) <= set(references)
        for version in set(versions):
            difference = np.abs(episode.log_probs - completion_log_probs(references[version], episode))
            assert difference[versions == version].max() <= 1e-4
            if episode.num_retractions == 0:
                assert isinstance(episode.routed_experts, np.ndarray)
                sent = np.sort(episode.routed_experts, axis=-1)[entered == version]
                expected = chosen_experts(references[version], episode, TOPK)[entered == version]
                np.testing.assert_array_equal(sent, expected)


def versions_of_passes(episode: Completion) -> np.ndarray:
    """Return the version of the pass that each token entered, int64 [P + C - 1]: the next sampled token's."""
    per_token, after = [], 0
    versions = iter(reversed(episode.policy_versions.array()))
    segments = episode.segments or Segments.single("policy", len(episode.token_ids))
    for sampled in reversed(segments.mask()):
        after = next(versions) if sampled else after
        per_token.append(after)
    first = [after] * (len(episode.prompt.token_ids) - 1)
    return np.array([*first, *reversed(per_token)])


class Slow(Partner):
    """Gives the weights time to change in the middle of episodes."""

    async def step(self, text: str):
        await asyncio.sleep(0.3)
        return await super().step(text)


class Unrepeatable(Slow):
    replayable = False
    begun = 0

    async def reset(self, prompt: Prompt) -> None:
        await super().reset(prompt)
        Unrepeatable.begun += 1


def stream_of(
    talk: Talk,
    engine,
    environment,
    version: int,
    prompts: Iterator[Prompt],
    state: Sequence[PendingGroup] = (),
) -> AsyncCollector:
    buffer = RolloutBuffer(
        lambda: next(prompts), batch_size=8, steps_per_rollout=1, max_staleness=1, requeue=True,
        max_attempts=2, policy_version=version,
    )  # fmt: skip
    buffer.restore(list(state))
    collector = Collector(
        [engine.url], routes=ROUTES, request_timeout_s=120.0, maker=talk.episodes(environment)
    )
    stream = AsyncCollector(collector, buffer, talk.sampling, lambda group: [], num_completions=2, seed=1)
    stream.start()
    return stream


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("mode", "place"), [("abort", 0), ("retract", 1)])
def test_weights_change_in_the_middle_of_episodes(
    talks, talking_engine, loaded, monkeypatch, tmp_path, mode, place
):
    talk = talks[place]
    wire = Wire().attach(monkeypatch)
    other = replace(talk, folder=make_talkative_model(tmp_path / "other", 1, talk.model))
    version = loaded(talk)
    stream = stream_of(talk, talking_engine, Slow, version, map(talk.prompt, count()))
    try:
        time.sleep(1)
        loaded(other, mode)
        stream.weights_synced(version + 1)
        groups = stream.take(120) + stream.take(120)  # all that were in flight
    finally:
        stream.stop(10)
    episodes = [episode for group in groups for episode in group]
    assert stream._messages == []
    for episode in episodes:
        check_tokens(episode, wire)
        assert (np.diff(episode.policy_versions.array()) >= 0).all()
    check_passes(episodes, {version: talk.folder, version + 1: other.folder})
    mixed = [episode for episode in episodes if len(episode.policy_versions.versions) > 1]
    retracted = sum(episode.num_retractions > 0 for episode in episodes)
    print(f"{mode}: {len(mixed)} of {len(episodes)} episodes are of two policies, {retracted} were retracted")
    assert mixed and any(episode.segments is not None for episode in mixed)
    assert mode == "retract" or retracted == 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize("environment", [Slow, Unrepeatable])
def test_episodes_go_on_after_a_resume(talks, talking_engine, loaded, monkeypatch, environment):
    """Replayable ones in the middle of a turn, others anew; twice through the bytes of a checkpoint."""
    talk = talks[2]
    wire = Wire().attach(monkeypatch)
    version = loaded(talk)
    prompts = {number: talk.prompt(number) for number in range(100)}
    unused = iter(prompts.values())
    state: list[PendingGroup] = []
    stops: list[dict[tuple[int, int], Completion]] = []
    Unrepeatable.begun = 0
    for _ in range(2):
        stream = stream_of(talk, talking_engine, environment, version, unused, state)
        time.sleep(1)
        stream.suspend(30)
        with stream.held() as buffer:
            state = unpack_pending(pack_pending(buffer.pending()), prompts)
        stream.stop(10)
        stops.append({(p.serial, i): c for p in state for i, c in enumerate(p.partials) if c})
    stream = stream_of(talk, talking_engine, environment, version, unused, state)
    try:
        groups = stream.take(120)
    finally:
        stream.stop(10)
    assert stream._messages == []
    episodes = [episode for group in groups for episode in group]
    for episode in episodes:
        check_tokens(episode, wire)
        said = sum(writer != "policy" for writer, _ in episode.segments.spans()) if episode.segments else 0
        assert said <= len(episode.reward_data["said"]) <= said + 1
    check_passes(episodes, {version: talk.folder})
    unfinished = [{k: c for k, c in stop.items() if c.finish_reason == "abort"} for stop in stops]
    observed = sum(c.num_given_at_end > 0 for stop in unfinished for c in stop.values())
    print(f"{[len(stop) for stop in unfinished]} unfinished episodes, {observed} ended with an observation")
    assert all(any(c.segments for c in stop.values()) for stop in unfinished)
    if environment is Slow:
        for key, before in unfinished[0].items():
            after = stops[1].get(key)
            if after is not None:
                np.testing.assert_array_equal(after.token_ids[: len(before.token_ids)], before.token_ids)
    else:
        assert Unrepeatable.begun > len(episodes)
