"""What is seen of an engine from afar; its actor and its /health are stood in for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray

from megatron_vespo.cluster import supervised_engine
from megatron_vespo.cluster.supervised_engine import SupervisedEngine
from megatron_vespo.rollout.sglang_server import EngineError
from megatron_vespo.system.http import EngineRequestError
from tests.support.waiting import until

URL = "http://engine:1"


class Actor:
    """Its calls are answered by what `answers` has for them: a value, an error, or nothing yet."""

    def __init__(self):
        self.answers: dict[str, list] = {"start": [URL], "check": []}
        self.killed = False

    def __getattr__(self, name: str):
        return SimpleNamespace(remote=lambda: (self, name))


@pytest.fixture()
def actors(monkeypatch) -> list[Actor]:
    """The actors that were made."""

    def wait(calls, timeout):
        [(actor, name)] = calls
        return (calls, []) if actor.answers[name] else ([], calls)

    def get(call):
        actor, name = call
        answer = actor.answers[name].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(actor):
        actor.killed = True

    monkeypatch.setattr(
        supervised_engine, "ray", SimpleNamespace(wait=wait, get=get, kill=kill, exceptions=ray.exceptions)
    )
    return []


@pytest.fixture()
def health(monkeypatch) -> list[Exception]:
    """What is wrong with the engine's /health, if anything."""
    wrong: list[Exception] = []

    def get_json(url, path, timeout_s, api_key):
        assert (url, path, api_key) == (URL, "/health", "key")
        if wrong:
            raise wrong[0]
        return {}

    monkeypatch.setattr(supervised_engine, "get_json", get_json)
    return wrong


@pytest.fixture()
def engine(actors, health, tmp_path):
    def make_actor() -> Actor:
        actors.append(Actor())
        return actors[-1]

    with ThreadPoolExecutor(1) as executor:
        yield SupervisedEngine(
            1, make_actor, start_timeout_s=60.0, health_timeout_s=0.3, executor=executor,
            log_path=tmp_path / "engine-1.log", api_key="key",
        )  # fmt: skip


def poll_for(engine: SupervisedEngine, seconds: float, check_health: bool = True) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        engine.poll(check_health)
        time.sleep(0.01)


def test_it_starts_and_stays_as_long_as_it_answers(engine, actors):
    engine.start()
    assert engine.url is None
    engine.poll(check_health=True)
    assert engine.url == URL
    actors[0].answers["check"] = [None]
    poll_for(engine, 0.6)
    assert len(actors) == engine.num_starts == 1


def test_the_end_of_its_process_is_told_and_it_is_started_by_the_same_actor(engine, actors):
    engine.start()
    engine.poll(True)
    died = EngineError("engine died (signal SIGKILL)", "the log")
    actors[0].answers["check"] = [ray.exceptions.RayTaskError("check", "", died)]
    with pytest.raises(EngineError, match=r"^engine died \(signal SIGKILL\); the log$"):
        engine.poll(True)
    engine.start()
    assert engine.url is None and engine.num_starts == 2 and len(actors) == 1


def test_a_dead_actor_gets_a_successor(engine, actors):
    engine.start()
    engine.poll(True)
    actors[0].answers["check"] = [ray.exceptions.RayActorError(error_msg="its node is gone")]
    with pytest.raises(EngineError, match="^engine 1's actor died: its node is gone; no log at"):
        engine.poll(True)
    engine.start()
    engine.poll(True)
    assert engine.url == URL and len(actors) == 2


def test_an_actor_without_an_answer_is_killed(engine, actors, monkeypatch):
    monkeypatch.setattr(supervised_engine, "CHECK_TIMEOUT_S", 0.05)
    engine.start()
    engine.poll(True)
    time.sleep(0.1)
    with pytest.raises(EngineError, match="^engine 1's actor: no answer to check"):
        engine.poll(True)
    assert actors[0].killed
    engine.start()
    assert len(actors) == 2


@pytest.mark.parametrize("status", [None, 503])
def test_an_engine_that_does_not_generate_hangs(engine, health, status):
    engine.start()
    poll_for(engine, 0.2)
    health.append(EngineRequestError(URL, "/health", status, "nothing"))
    poll_for(engine, 0.15)  # not at the first time
    with pytest.raises(EngineError, match=f"^engine {URL} hangs: it has generated nothing for 0.3 s"):
        poll_for(engine, 5.0)


def test_silence_does_not_count_while_nobody_asks(engine, health):
    engine.start()
    engine.poll(True)
    health.append(EngineRequestError(URL, "/health", 503, "paused"))
    poll_for(engine, 0.6, check_health=False)
    health.clear()
    poll_for(engine, 0.6)


def test_it_says_that_it_waits_for_a_sign_of_life(engine, monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(supervised_engine, "get_json", lambda *arguments: asked.wait(5))
    engine.start()
    engine.poll(True)
    assert engine.awaits_health_check
    asked.set()
    until(lambda: not engine.awaits_health_check)
