"""What is seen of an engine from afar; its actor and its /health are stood in for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray

from megatron_vespo.cluster import engine_slot
from megatron_vespo.cluster.engine_slot import EngineSlot
from megatron_vespo.rollout.engine import EngineError
from megatron_vespo.system.http import EngineRequestError

URL = "http://engine:1"


class Worker:
    """Its calls are answered by what `answers` has for them: a value, an error, or nothing yet."""

    def __init__(self):
        self.answers: dict[str, list] = {"start": [URL], "check": []}
        self.killed = False

    def __getattr__(self, name: str):
        return SimpleNamespace(remote=lambda: (self, name))


@pytest.fixture()
def workers(monkeypatch) -> list[Worker]:
    """The actors that were made."""

    def wait(calls, timeout):
        [(worker, name)] = calls
        return (calls, []) if worker.answers[name] else ([], calls)

    def get(call):
        worker, name = call
        answer = worker.answers[name].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(worker):
        worker.killed = True

    monkeypatch.setattr(
        engine_slot, "ray", SimpleNamespace(wait=wait, get=get, kill=kill, exceptions=ray.exceptions)
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

    monkeypatch.setattr(engine_slot, "get_json", get_json)
    return wrong


@pytest.fixture()
def slot(workers, health, tmp_path):
    def make_worker() -> Worker:
        workers.append(Worker())
        return workers[-1]

    with ThreadPoolExecutor(1) as probes:
        yield EngineSlot(
            1, make_worker, start_timeout_s=60.0, health_timeout_s=0.3, probes=probes,
            log_path=tmp_path / "engine-1.log", api_key="key",
        )  # fmt: skip


def look_for(slot: EngineSlot, seconds: float, probing: bool = True) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        slot.look(probing)
        time.sleep(0.01)


def test_it_starts_and_stays_as_long_as_it_answers(slot, workers):
    slot.start()
    assert slot.url is None
    slot.look(probing=True)
    assert slot.url == URL
    workers[0].answers["check"] = [None]
    look_for(slot, 0.6)
    assert len(workers) == slot.num_starts == 1


def test_the_end_of_its_process_is_told_and_it_is_started_by_the_same_actor(slot, workers):
    slot.start()
    slot.look(True)
    died = EngineError("engine died (signal SIGKILL)", "the log")
    workers[0].answers["check"] = [ray.exceptions.RayTaskError("check", "", died)]
    with pytest.raises(EngineError, match=r"^engine died \(signal SIGKILL\); the log$"):
        slot.look(True)
    slot.start()
    assert slot.url is None and slot.num_starts == 2 and len(workers) == 1


def test_a_dead_actor_gets_a_successor(slot, workers):
    slot.start()
    slot.look(True)
    workers[0].answers["check"] = [ray.exceptions.RayActorError(error_msg="its node is gone")]
    with pytest.raises(EngineError, match="^engine 1's actor died: its node is gone; no log at"):
        slot.look(True)
    slot.start()
    slot.look(True)
    assert slot.url == URL and len(workers) == 2


def test_an_actor_without_an_answer_is_killed(slot, workers, monkeypatch):
    monkeypatch.setattr(engine_slot, "CHECK_TIMEOUT_S", 0.05)
    slot.start()
    slot.look(True)
    time.sleep(0.1)
    with pytest.raises(EngineError, match="^engine 1's actor: no answer to check"):
        slot.look(True)
    assert workers[0].killed
    slot.start()
    assert len(workers) == 2


@pytest.mark.parametrize("status", [None, 503])
def test_an_engine_that_does_not_generate_hangs(slot, health, status):
    slot.start()
    look_for(slot, 0.2)
    health.append(EngineRequestError(URL, "/health", status, "nothing"))
    look_for(slot, 0.15)  # not at the first time
    with pytest.raises(EngineError, match=f"^engine {URL} hangs: it has generated nothing for 0.3 s"):
        look_for(slot, 5.0)


def test_silence_does_not_count_while_nobody_asks(slot, health):
    slot.start()
    slot.look(True)
    health.append(EngineRequestError(URL, "/health", 503, "paused"))
    look_for(slot, 0.6, probing=False)
    health.clear()
    look_for(slot, 0.6)


def test_it_says_that_it_waits_for_a_sign_of_life(slot, monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(engine_slot, "get_json", lambda *arguments: asked.wait(5))
    slot.start()
    slot.look(True)
    assert slot.is_probed
    asked.set()
    deadline = time.monotonic() + 5
    while slot.is_probed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
