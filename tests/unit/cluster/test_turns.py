"""Whose turn it is: what engines are asked for, in order; servers, trainer and weights are stood in for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_vespo.cluster.colocated import ColocatedSync, ColocatedTrainer
from megatron_vespo.cluster.engine_fleet import EngineEndpoint
from megatron_vespo.cluster.turns import Turns
from megatron_vespo.system.http import EngineRequestError

ALL = {"kv_cache", "cuda_graph", "weights"}


class Servers:
    """SGLang's side. What it would die of is an assertion here, `lost` are the urls that do not answer."""

    def __init__(self):
        self.log: list[tuple[str, str]] = []
        self.given: dict[str, set[str]] = {}
        self.flushed: set[str] = set()
        self.lost: set[str] = set()

    def post(self, url, path, payload, timeout_s, api_key):
        assert api_key == "key"
        if url in self.lost:
            raise EngineRequestError(url, path, None, "gone")
        given, name = self.given.setdefault(url, set()), path.partition("?")[0].lstrip("/")
        self.log.append((name, url))
        tags = set(payload.get("tags", ()))
        if name == "flush_cache":
            self.flushed.add(url)
        elif name == "release_memory_occupation":
            assert url in self.flushed and tags and not tags & given, f"{url} gives {tags}, has given {given}"
            given |= tags
        elif name == "resume_memory_occupation":
            assert tags and tags <= given, f"{url} takes {tags}, has given {given}"
            given -= tags
            self.flushed.discard(url)
        elif name == "weights_checker":
            assert "weights" not in given
            return {"ranks": [{"checksums": {"w": url}}]}
        return {}

    def take(self) -> list[str]:
        """What was asked since the last time, of all engines."""
        log, self.log = self.log, []
        return [name for name, _ in log]


class Fleet:
    """Engines that run, by number."""

    def __init__(self, *numbers: int):
        self.running = [EngineEndpoint(n, 1, f"http://{n}-1", fresh=True) for n in numbers]
        self.waiting: list[EngineEndpoint] = []
        self.held = self.starts_wait = False
        self.calls: list[str] = []

    def hold(self) -> list[EngineEndpoint]:
        self.held = self.starts_wait = True
        return list(self.running)

    def start_waiting(self) -> None:
        self.starts_wait = False
        self.running += self.waiting
        self.waiting = []

    def let_go(self) -> None:
        self.start_waiting()
        self.held = False

    def lose(self, endpoint: EngineEndpoint, why: str) -> None:
        assert "gone" in why
        self.running.remove(endpoint)
        again = EngineEndpoint(
            endpoint.number, endpoint.start + 1, f"http://{endpoint.number}-{endpoint.start + 1}", True
        )
        (self.waiting if self.starts_wait else self.running).append(again)

    # what a weight sync asks for
    def endpoints(self) -> list[EngineEndpoint]:
        return list(self.running)

    def quiet(self):
        return nullcontext()

    def serve(self, endpoints: list[EngineEndpoint]) -> None:
        served = {endpoint.number for endpoint in endpoints}
        self.running = [
            EngineEndpoint(e.number, e.start, e.url, fresh=e.fresh and e.number not in served)
            for e in self.running
        ]

    def metrics(self) -> dict[str, float]:
        return {}


class Trainer:
    """Computes, and says so, only where engines have made room for it."""

    def __init__(self, servers: Servers, fleet: Fleet):
        self.servers, self.fleet = servers, fleet
        self.did: list[str] = []
        self.loaded: dict = {}

    def note(self, what: str, *must_be_given: str) -> None:
        for endpoint in self.fleet.running:
            given = self.servers.given.get(endpoint.url, set())
            assert set(must_be_given) <= given, f"{what} while {endpoint.url} has given {given}"
        self.did.append(what)


@pytest.fixture()
def made(monkeypatch):
    """Two engines, their servers, turns, and trainer and sync that take them."""
    servers, fleet = Servers(), Fleet(0, 1)
    monkeypatch.setattr("megatron_vespo.weight_sync.distributed.post_json", servers.post)
    base = Trainer(servers, fleet)

    class Stub(ColocatedTrainer):
        def __init__(self, turns: Turns):
            self._turns = turns

        def give_memory_back(self, keep_weights: bool = False) -> None:
            base.did.append("give back all but weights" if keep_weights else "give back")

        def sync_weights(self, version: int) -> None:
            for endpoint in fleet.running:
                assert servers.given.get(endpoint.url, set()) == {"kv_cache", "cuda_graph"}
            base.did.append(f"sync {version}")

        def check_weights(self, version: int) -> float:
            return 0.0

    parent = ColocatedTrainer.__mro__[1]
    monkeypatch.setattr(parent, "start", lambda self: base.note("start", *ALL))
    monkeypatch.setattr(parent, "prepare", lambda self, batches: base.note("prepare", *ALL))
    monkeypatch.setattr(
        parent, "log_probs", lambda self, samples: base.note("log-probs", "kv_cache", "cuda_graph")
    )
    monkeypatch.setattr(
        parent, "save", lambda self, state, buffer: base.note("save", "kv_cache", "cuda_graph")
    )
    monkeypatch.setattr(
        parent, "export_hf", lambda self, target: base.note("export", "kv_cache", "cuda_graph")
    )
    monkeypatch.setattr(
        parent, "connect_engines",
        lambda self, urls, fresh, number, size, key, loaded: base.loaded.update(loaded),
    )  # fmt: skip
    traced: list[str] = []
    turns = Turns(fleet, "key", 5.0, lambda name, start, end: traced.append(name))
    trainer = Stub(turns)
    sync = ColocatedSync(fleet, 1, "key", turns)
    sync.attach(trainer)
    return servers, fleet, base, turns, trainer, sync


GIVE = ["abort_request"] * 2 + ["flush_cache"] * 2 + ["release_memory_occupation"] * 2
TAKE = ["resume_memory_occupation"] * 2


def turn(version: int) -> list[str]:
    """What the trainer does for a sync: its weights stay until the engines have them."""
    return ["give back all but weights", f"sync {version}", "give back"]


def test_a_run(made):
    servers, fleet, base, turns, trainer, sync = made
    trainer.start()
    assert servers.take() == ["weights_checker"] * 2 + GIVE and fleet.held
    sync.sync(0)
    assert servers.take() == TAKE + TAKE and not fleet.held
    # what they had loaded is known, though their memory is gone
    assert base.loaded == {"http://0-1": {"w": "http://0-1"}, "http://1-1": {"w": "http://1-1"}}
    for version in (1, 2):
        trainer.prepare([])
        assert servers.take() == GIVE and all(given == ALL for given in servers.given.values())
        sync.sync(version)
        assert servers.take() == TAKE + TAKE and not any(servers.given.values())
    trainer.save({}, None)
    assert servers.take() == GIVE + TAKE and not any(servers.given.values()) and not fleet.held
    trainer.log_probs([])
    assert servers.take() == GIVE + TAKE
    trainer.export_hf(Path("hf"))
    assert servers.take() == GIVE + TAKE
    assert base.did == [
        "start", *turn(0), "prepare", *turn(1), "prepare", *turn(2),
        "save", "give back", "log-probs", "give back", "export", "give back",
    ]  # fmt: skip
    assert sync.metrics()["engines/turn_seconds"] == turns.seconds > 0


def test_what_computes_in_the_trainers_turn_moves_nothing(made):
    servers, fleet, base, turns, trainer, sync = made
    trainer.start()
    servers.take()
    trainer.log_probs([])
    trainer.save({}, None)
    trainer.prepare([])
    assert servers.take() == [] and fleet.held
    assert base.did == ["start", "log-probs", "save", "prepare"]


@pytest.mark.parametrize("path", ["abort", "flush", "release"])
def test_an_engine_lost_on_giving_comes_back_with_the_sync(made, monkeypatch, path):
    servers, fleet, base, turns, trainer, sync = made
    trainer.start()
    sync.sync(0)
    post = servers.post

    def losing(url, call, payload, timeout_s, api_key):
        if call.startswith(f"/{path}") and url == "http://1-1":
            servers.lost.add(url)
        return post(url, call, payload, timeout_s, api_key)

    monkeypatch.setattr("megatron_vespo.weight_sync.distributed.post_json", losing)
    trainer.prepare([])
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1"]
    assert [endpoint.url for endpoint in fleet.waiting] == ["http://1-2"]
    sync.sync(1)
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1", "http://1-2"] and not fleet.held
    trainer.prepare([])
    assert all(servers.given[f"http://{name}"] == ALL for name in ("0-1", "1-2"))


def test_a_sync_that_loses_an_engine_goes_on_where_the_others_are(made):
    servers, fleet, base, turns, trainer, sync = made
    trainer.start()
    servers.lost.add("http://1-1")
    sync.sync(0)
    assert base.did[-2:] == ["sync 0", "give back"] and not servers.given["http://0-1"]
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1", "http://1-2"]


def test_a_sync_that_is_repeated_finds_the_room_of_the_first_one(made):
    """An engine ends when it takes its cache back; the other one, which has its own, gives way again."""
    servers, fleet, base, turns, trainer, sync = made
    trainer.start()
    resume = turns.resume

    def losing(endpoints, tags):
        if "kv_cache" in tags and base.did[-1] == "give back":
            servers.lost.add("http://1-1")
        resume(endpoints, tags)

    turns.resume = losing
    sync.sync(0)
    assert base.did[1:] == [*turn(0), *turn(0)[1:]]
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1", "http://1-2"]
    assert not any(servers.given[endpoint.url] for endpoint in fleet.running)


def test_a_trainer_that_dies_in_a_sync_is_followed_by_one_with_its_turn(made):
    servers, fleet, base, turns, trainer, sync = made
    trainer.start()
    died = RuntimeError("rank 1 died")

    def die(version: int) -> None:
        raise died

    trainer.sync_weights = die
    with pytest.raises(RuntimeError, match="rank 1 died"):
        sync.sync(0)
    assert fleet.held  # nobody asks engines without their cache for a token
    del trainer.sync_weights
    trainer.start()
    assert all(given == ALL for given in servers.given.values())
    sync.sync(0)
    assert not any(servers.given.values()) and not fleet.held


def test_a_trainer_that_dies_at_a_save_too(made):
    servers, fleet, base, turns, trainer, sync = made
    trainer.start()
    sync.sync(0)
    with pytest.raises(RuntimeError), turns.lent(lambda: None):
        raise RuntimeError("rank 0 died")
    assert fleet.held and all(given == {"kv_cache", "cuda_graph"} for given in servers.given.values())
    trainer.start()
    assert all(given == ALL for given in servers.given.values())
