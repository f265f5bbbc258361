"""GPU sharing: what engines are asked for, in order; stubs stand in for servers, trainer and weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_vespo.cluster.colocated import ColocatedSync, ColocatedTrainer
from megatron_vespo.cluster.gpu_sharing import GpuSharing
from megatron_vespo.cluster.supervised_engine import EngineEndpoint
from megatron_vespo.system.http import EngineRequestError

ALL = {"kv_cache", "cuda_graph", "weights"}


class Servers:
    """SGLang's side. What it would die of is an assertion here, `lost` are the urls that do not answer."""

    def __init__(self):
        self.log: list[tuple[str, str]] = []
        self.offloaded: dict[str, set[str]] = {}
        self.flushed: set[str] = set()
        self.lost: set[str] = set()

    def post(self, url, path, payload, timeout_s, api_key):
        assert api_key == "key"
        if url in self.lost:
            raise EngineRequestError(url, path, None, "gone")
        offloaded, name = self.offloaded.setdefault(url, set()), path.partition("?")[0].lstrip("/")
        self.log.append((name, url))
        tags = set(payload.get("tags", ()))
        if name == "flush_cache":
            self.flushed.add(url)
        elif name == "release_memory_occupation":
            assert url in self.flushed and tags and not tags & offloaded, (
                f"{url} offloads {tags}, has offloaded {offloaded}"
            )
            offloaded |= tags
        elif name == "resume_memory_occupation":
            assert tags and tags <= offloaded, f"{url} onloads {tags}, has offloaded {offloaded}"
            offloaded -= tags
            self.flushed.discard(url)
        elif name == "weights_checker":
            assert "weights" not in offloaded
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

    def note(self, what: str, *must_be_offloaded: str) -> None:
        for endpoint in self.fleet.running:
            offloaded = self.servers.offloaded.get(endpoint.url, set())
            assert set(must_be_offloaded) <= offloaded, (
                f"{what} while {endpoint.url} has offloaded {offloaded}"
            )
        self.did.append(what)


@pytest.fixture()
def made(monkeypatch):
    """Two engines, their servers, and a trainer and a weight sync that share GPUs with them."""
    servers, fleet = Servers(), Fleet(0, 1)
    monkeypatch.setattr("megatron_vespo.weight_sync.engine_admin.post_json", servers.post)
    base = Trainer(servers, fleet)

    class Stub(ColocatedTrainer):
        def __init__(self, gpu_sharing: GpuSharing):
            self._gpu_sharing = gpu_sharing

        def offload(self, keep_weights: bool = False) -> None:
            base.did.append("offload all but weights" if keep_weights else "offload")

        def sync_weights(self, version: int) -> dict[str, float]:
            for endpoint in fleet.running:
                assert servers.offloaded.get(endpoint.url, set()) == {"kv_cache", "cuda_graph"}
            base.did.append(f"sync {version}")
            return {"sync/pause_seconds": 0.0}

        def check_weights(self, version: int) -> float:
            return 0.0

    parent = ColocatedTrainer.__mro__[1]
    some = ALL - {"weights"}
    needed = {"start": ALL, "prepare": ALL, "log_probs": some, "save": some, "export_hf": some}
    for name, tags in needed.items():
        monkeypatch.setattr(parent, name, lambda *_, what=(name, *tags): base.note(*what))
    monkeypatch.setattr(
        parent, "connect_engines",
        lambda self, urls, fresh, number, size, key, loaded: base.loaded.update(loaded),
    )  # fmt: skip
    traced: list[str] = []
    sharing = GpuSharing(fleet, "key", 5.0, lambda name, start, end: traced.append(name))
    trainer = Stub(sharing)
    sync = ColocatedSync(fleet, 1, "key", sharing, log=print)
    sync.attach(trainer)
    return servers, fleet, base, sharing, trainer, sync


OFFLOAD = ["abort_request"] * 2 + ["flush_cache"] * 2 + ["release_memory_occupation"] * 2
ONLOAD = ["resume_memory_occupation"] * 2


def sync_of(version: int) -> list[str]:
    """What the trainer does for a sync: its weights stay until the engines have them."""
    return ["offload all but weights", f"sync {version}", "offload"]


def test_a_run(made):
    servers, fleet, base, sharing, trainer, sync = made
    trainer.start()
    assert servers.take() == ["weights_checker"] * 2 + OFFLOAD and fleet.held
    sync.sync(0)
    assert servers.take() == ONLOAD + ONLOAD and not fleet.held
    # what they had loaded is known, though their memory is gone
    assert base.loaded == {"http://0-1": {"w": "http://0-1"}, "http://1-1": {"w": "http://1-1"}}
    for version in (1, 2):
        trainer.prepare([])
        assert servers.take() == OFFLOAD and all(tags == ALL for tags in servers.offloaded.values())
        sync.sync(version)
        assert servers.take() == ONLOAD + ONLOAD and not any(servers.offloaded.values())
    trainer.save({}, None)
    assert servers.take() == OFFLOAD + ONLOAD and not any(servers.offloaded.values()) and not fleet.held
    trainer.log_probs([])
    assert servers.take() == OFFLOAD + ONLOAD
    trainer.export_hf(Path("hf"))
    assert servers.take() == OFFLOAD + ONLOAD
    assert base.did == [
        "start", *sync_of(0), "prepare", *sync_of(1), "prepare", *sync_of(2),
        "save", "offload", "log_probs", "offload", "export_hf", "offload",
    ]  # fmt: skip
    assert sync.metrics()["engines/turn_seconds"] == sharing.seconds > 0


def test_what_computes_in_the_trainers_turn_moves_nothing(made):
    servers, fleet, base, sharing, trainer, sync = made
    trainer.start()
    servers.take()
    trainer.log_probs([])
    trainer.save({}, None)
    trainer.prepare([])
    assert servers.take() == [] and fleet.held
    assert base.did == ["start", "log_probs", "save", "prepare"]


@pytest.mark.parametrize("path", ["abort", "flush", "release"])
def test_an_engine_lost_on_giving_comes_back_with_the_sync(made, monkeypatch, path):
    servers, fleet, base, sharing, trainer, sync = made
    trainer.start()
    sync.sync(0)
    post = servers.post

    def losing(url, call, payload, timeout_s, api_key):
        if call.startswith(f"/{path}") and url == "http://1-1":
            servers.lost.add(url)
        return post(url, call, payload, timeout_s, api_key)

    monkeypatch.setattr("megatron_vespo.weight_sync.engine_admin.post_json", losing)
    trainer.prepare([])
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1"]
    assert [endpoint.url for endpoint in fleet.waiting] == ["http://1-2"]
    sync.sync(1)
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1", "http://1-2"] and not fleet.held
    trainer.prepare([])
    assert all(servers.offloaded[f"http://{name}"] == ALL for name in ("0-1", "1-2"))


def test_a_sync_that_loses_an_engine_goes_on_where_the_others_are(made):
    servers, fleet, base, sharing, trainer, sync = made
    trainer.start()
    servers.lost.add("http://1-1")
    sync.sync(0)
    assert base.did[-2:] == ["sync 0", "offload"] and not servers.offloaded["http://0-1"]
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1", "http://1-2"]


def test_a_sync_that_is_repeated_finds_the_room_of_the_first_one(made):
    """An engine ends when it takes its cache back; the other one, which has its own, gives way again."""
    servers, fleet, base, sharing, trainer, sync = made
    trainer.start()
    onload = sharing.onload

    def losing(endpoints, tags):
        if "kv_cache" in tags and base.did[-1] == "offload":
            servers.lost.add("http://1-1")
        onload(endpoints, tags)

    sharing.onload = losing
    sync.sync(0)
    assert base.did[1:] == [*sync_of(0), *sync_of(0)[1:]]
    assert [endpoint.url for endpoint in fleet.running] == ["http://0-1", "http://1-2"]
    assert not any(servers.offloaded[endpoint.url] for endpoint in fleet.running)


def test_a_trainer_that_dies_in_a_sync_is_followed_by_one_with_its_turn(made):
    servers, fleet, base, sharing, trainer, sync = made
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
    assert all(tags == ALL for tags in servers.offloaded.values())
    sync.sync(0)
    assert not any(servers.offloaded.values()) and not fleet.held


def test_a_trainer_that_dies_at_a_save_too(made):
    servers, fleet, base, sharing, trainer, sync = made
    trainer.start()
    sync.sync(0)
    with pytest.raises(RuntimeError), sharing.engines_offloaded(lambda: None):
        raise RuntimeError("rank 0 died")
    assert fleet.held and all(tags == {"kv_cache", "cuda_graph"} for tags in servers.offloaded.values())
    trainer.start()
    assert all(tags == ALL for tags in servers.offloaded.values())
