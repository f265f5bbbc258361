"""What becomes of engines that end, and how the weights get to those that run; servers are stood in for."""

import threading
import time
from pathlib import Path

import pytest

from megatron_vespo.cluster import engine_fleet
from megatron_vespo.cluster.engine_fleet import EngineFleet
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.supervised_engine import SupervisedEngine
from megatron_vespo.observability.activity import EngineStates
from megatron_vespo.rollout.sglang_server import EngineError, EnginePortError
from megatron_vespo.weight_sync.engine_admin import EnginesLostError, WeightSyncError
from megatron_vespo.weight_sync.verify import WeightMismatchError
from tests.support.waiting import until


class Engine(SupervisedEngine):
    """Healthy as soon as it is allowed to; the test ends it. There is no actor and no server."""

    awaits_health_check = False

    def __init__(self, number: int):
        super().__init__(
            number, object, start_timeout_s=0.0, health_timeout_s=0.0, executor=None,
            log_path=Path(f"logs/engine-{number}.log"), api_key=None,
        )  # fmt: skip
        self.may_start, self.end_with = True, None
        self.always_ends: str | None = None
        self.stopped = self.dropped = False
        self.health_checked: list[bool] = []

    def _ask(self, what: str, timeout_s: float) -> None:
        pass

    def poll(self, check_health: bool) -> None:
        self.health_checked.append(check_health)
        how, self.end_with = self.end_with or self.always_ends, None
        if isinstance(how, EngineError):
            raise how
        if how is not None:
            raise EngineError(f"engine http://h:{3000 + self.num_starts} {how}", "the end of its log")
        if self.may_start and self.url is None:
            self.become_ready(f"http://engine-{self.number}-{self.num_starts}")

    def stop(self) -> None:
        self.stopped = True

    def kill_actor(self) -> None:
        self.dropped = True


@pytest.fixture()
def start(monkeypatch):
    monkeypatch.setattr(engine_fleet, "POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(engine_fleet, "DEATH_NOTICE_S", 0.05)
    fleets = []

    def start(*engines: Engine, restarts: int = 3, min_engines: int = 1):
        said: list[str] = []
        fleets.append(EngineFleet(engines, restarts=restarts, min_engines=min_engines, log=said.append))
        return fleets[-1], said

    yield start
    for fleet in fleets:
        fleet.stop()
        assert not fleet._thread.is_alive()


class Trainer:
    """Notes what is asked of it; `lose[call]` are the engines that it finds lost there, once."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.lose: dict[str, list[str]] = {}

    def _call(self, name: str, *arguments) -> None:
        self.calls.append((name, *arguments))
        if name in self.lose:
            raise EnginesLostError({url: f"engine {url}: gone" for url in self.lose.pop(name)})

    def connect_engines(self, urls, fresh, number, engine_size, api_key) -> str:
        assert api_key == KEY
        self._call("connect", urls, fresh, number, engine_size)
        return "weights go somehow"

    def sync_weights(self, version: int) -> dict[str, float]:
        self._call("sync", version)
        return {"sync/pause_seconds": 0.25}

    def check_weights(self, version: int) -> float:
        self._call("check", version)
        return 0.5


KEY = "key"
A1, B1, B2 = "http://engine-0-1", "http://engine-1-1", "http://engine-1-2"


def trained(fleet: EngineFleet, engine_size: int = 1) -> tuple[Trainer, EngineSync]:
    """A trainer of the fleet's engines, once they are ready."""
    fleet.wait_until_ready()
    trainer, sync = Trainer(), EngineSync(fleet, engine_size, KEY, log=print)
    sync.attach(trainer)
    return trainer, sync


def test_engines_serve_when_they_have_the_weights(start):
    fleet, said = start(Engine(0), Engine(1))
    fleet.wait_until_ready()
    assert list(fleet.urls) == [None, None] and fleet.any_ready() and not fleet.any_serves()
    trainer, sync = trained(fleet, engine_size=2)
    seconds = {"sync/pause_seconds": 0.25, "sync/weight_check_seconds": 0.5}
    assert sync.sync(0) == seconds
    assert list(fleet.urls) == [A1, B1] and not fleet.any_ready()
    assert sync.sync(4) == seconds
    # connected once
    assert trainer.calls == [
        ("connect", [A1, B1], [A1, B1], 1, 2), ("sync", 0), ("check", 0), ("sync", 4), ("check", 4),
    ]  # fmt: skip
    assert said == []
    assert fleet.metrics() == {"engines/serving": 2, "engines/restarts": 0, "engines/lost_requests": 0}


def test_a_dead_engine_is_started_again_and_rejoins(start):
    first, second = Engine(0), Engine(1)
    fleet, said = start(first, second)
    trainer, sync = trained(fleet)
    sync.sync(0)
    assert fleet.states().condition() == "all 2 engines serve"
    second.may_start, second.end_with = False, "died (signal SIGKILL)"
    until(lambda: list(fleet.urls) == [A1, None])
    fleet.check()
    until(lambda: fleet.states().starting)
    assert fleet.states() == EngineStates(2, 1, 1, ((1, 1),), 3)  # as the log says: restart 1 of 3
    assert said == [
        "engine http://h:3001 died (signal SIGKILL); 1 of 2 engines serve, engine 1 is started again "
        "(restart 1 of 3)"
    ]
    sync.sync(1)  # without it
    second.may_start = True
    until(fleet.any_ready)
    assert list(fleet.urls) == [A1, None]
    assert sync.is_wanted(while_others_serve=True) and not sync.is_wanted(while_others_serve=False)
    sync.sync(2)
    assert list(fleet.urls) == [A1, B2] and not sync.is_wanted(while_others_serve=True)
    assert said[1:] == ["engine 1 serves again (2 of 2 engines serve)"]
    connections = [call for call in trainer.calls if call[0] == "connect"]
    assert connections == [
        ("connect", [A1, B1], [A1, B1], 1, 1),
        ("connect", [A1], [], 2, 1),
        ("connect", [A1, B2], [B2], 3, 1),
    ]


@pytest.mark.parametrize("where", ["connect", "sync", "check"])
def test_a_sync_that_loses_an_engine_is_repeated_without_it(start, where):
    first, second = Engine(0), Engine(1)
    fleet, said = start(first, second)
    trainer, sync = trained(fleet)
    trainer.lose[where] = [B1]
    second.may_start = False
    sync.sync(5)
    assert list(fleet.urls) == [A1, None] and second.num_starts == 2
    assert trainer.calls[-3:] == [("connect", [A1], [A1], 2, 1), ("sync", 5), ("check", 5)]
    assert said == [f"engine {B1}: gone; 0 of 2 engines serve, engine 1 is started again (restart 1 of 3)"]
    second.may_start = True
    until(fleet.any_ready)
    sync.sync(6)
    assert list(fleet.urls) == [A1, B2]


def test_where_no_engine_is_left_a_sync_waits_for_one(start):
    engine = Engine(0)
    fleet, _ = start(engine)
    trainer, sync = trained(fleet)
    trainer.lose["sync"] = [A1]
    sync.sync(0)
    again = "http://engine-0-2"
    assert list(fleet.urls) == [again]
    assert trainer.calls == [
        ("connect", [A1], [A1], 1, 1), ("sync", 0), ("connect", [again], [again], 2, 1), ("sync", 0),
        ("check", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [WeightMismatchError("other weights"), WeightSyncError("refused")])
def test_what_no_restart_mends_ends_the_sync(start, error):
    fleet, _ = start(Engine(0))
    trainer, sync = trained(fleet)

    def refuse(version: int) -> None:
        raise error

    trainer.sync_weights = refuse
    with pytest.raises(type(error), match=str(error)):
        sync.sync(0)
    assert list(fleet.urls) == [None]


def test_restarts_run_out(start):
    first, second = Engine(0), Engine(1)
    fleet, said = start(first, second, restarts=1)
    fleet.wait_until_ready()
    for starts in (1, 2):
        until(lambda: second.url is not None)
        second.end_with = f"died (signal {starts})"
        until(lambda: second.end_with is None)
    until(lambda: second.stopped)
    fleet.check()
    assert said[-1] == (
        "engine http://h:3002 died (signal 2) and has had its --engine-restarts 1: "
        "the run goes on without it, 0 of 2 engines serve"
    )
    assert fleet.states() == EngineStates(2, 0, 1, (), 1, (1,))
    assert [endpoint.number for endpoint in fleet.endpoints()] == [0]
    first.end_with = "hangs"
    until(lambda: first.num_starts == 2)
    first.always_ends = "hangs"
    over = (
        r"^engine http://h:3002 hangs and has had its --engine-restarts 1: 0 engines are left, "
        r"--min-engines is 1; see logs/engine-0.log; the end of its log$"
    )
    until(lambda: fleet._over is not None)
    for wait in (fleet.check, fleet.endpoints, fleet.wait_until_ready):
        with pytest.raises(EngineError, match=over):
            wait()


def test_fewer_than_min_engines_end_the_run_though_one_serves(start):
    first, second = Engine(0), Engine(1)
    fleet, _ = start(first, second, restarts=0, min_engines=2)
    fleet.wait_until_ready()
    second.end_with = "died"
    until(lambda: fleet._over is not None)
    with pytest.raises(EngineError, match="1 engines are left, --min-engines is 2"):
        fleet.check()


def test_a_first_start_that_fails_twice_in_the_same_way_ends_the_run_with_the_log(start):
    engine = Engine(0)
    engine.always_ends = "died (exit status 2)"  # each time from another port
    fleet, said = start(engine)
    with pytest.raises(EngineError, match=r"died \(exit status \d\); the end of its log$"):
        fleet.wait_until_ready()
    assert engine.num_starts == 2 and len(said) == 1


def test_a_first_start_that_fails_in_different_ways_goes_on(start):
    engine = Engine(0)
    engine.may_start, engine.end_with = False, "died (signal SIGKILL)"
    fleet, _ = start(engine)
    until(lambda: engine.num_starts == 2)
    engine.end_with = "is not healthy"
    until(lambda: engine.num_starts == 3)
    engine.may_start = True
    fleet.wait_until_ready()
    assert [endpoint.start for endpoint in fleet.endpoints()] == [3]


def test_nobody_is_taken_for_hung_while_the_weights_change(start):
    engine = Engine(0)
    fleet, _ = start(engine)
    fleet.wait_until_ready()
    with fleet.quiet():
        time.sleep(0.05)
        engine.health_checked.clear()
        until(lambda: len(engine.health_checked) > 3)
        assert not any(engine.health_checked)
    engine.health_checked.clear()
    until(lambda: engine.health_checked)
    assert all(engine.health_checked)


def test_held_engines_are_neither_checked_nor_started(start):
    first, second = Engine(0), Engine(1)
    fleet, said = start(first, second)
    assert [endpoint.url for endpoint in fleet.hold()] == [A1, B1]  # it waited for them
    for engine in (first, second):
        engine.health_checked.clear()
    second.end_with = "died"
    until(lambda: said)
    assert second.num_starts == 1
    # again, as by another trainer: the one that is to be started later is not waited for
    assert [endpoint.url for endpoint in fleet.hold()] == [A1]
    until(lambda: len(first.health_checked) > 3)
    assert not any(first.health_checked)
    fleet.start_waiting()
    until(lambda: second.url == B2)
    assert not any(second.health_checked)
    assert [endpoint.url for endpoint in fleet.hold()] == [A1, B2]
    fleet.let_go()
    fleet.let_go()
    until(lambda: first.health_checked[-1] and second.health_checked[-1])
    assert fleet._quiet == 0


def test_to_hold_waits_for_signs_of_life(start):
    engine = Engine(0)
    fleet, _ = start(engine)
    fleet.wait_until_ready()
    engine.awaits_health_check = True
    held = []
    thread = threading.Thread(target=lambda: held.append(fleet.hold()))
    thread.start()
    time.sleep(0.05)
    assert not held
    engine.awaits_health_check = False
    thread.join(5)
    assert [endpoint.url for endpoint in held[0]] == [A1]


def test_what_is_known_of_an_older_server_says_nothing_of_the_new_one(start):
    engine = Engine(0)
    fleet, _ = start(engine)
    [endpoint] = fleet.endpoints()
    engine.end_with = "died"
    until(lambda: engine.num_starts == 2)
    fleet.endpoints()
    fleet.lose(endpoint, "no answer")
    fleet.serve([endpoint])
    assert engine.num_starts == 2 and list(fleet.urls) == [None]


def test_without_a_trainer_engines_serve_what_they_have_loaded(start):
    fleet, _ = start(Engine(0))
    fleet.wait_until_ready()
    sync = EngineSync(fleet, 1, log=print)
    assert sync.is_wanted(while_others_serve=False)
    assert sync.sync(0) == {}
    assert list(fleet.urls) == [A1]


def test_a_port_of_the_user_that_is_in_use_is_not_tried_again(start):
    engine = Engine(0)
    message = "it cannot listen on h:30000; choose another port with --rollout-port"
    engine.always_ends = EnginePortError(message)
    fleet, said = start(engine)
    with pytest.raises(EngineError, match=f"^{message}$"):
        fleet.wait_until_ready()
    assert engine.num_starts == 1 and not said


def test_engines_of_fixed_weights_serve_without_a_sync(monkeypatch):
    """A teacher's: at their start, and again after a restart."""
    monkeypatch.setattr(engine_fleet, "POLL_INTERVAL_S", 0.01)
    engines, said = [Engine(4), Engine(5)], []
    fleet = EngineFleet(engines, restarts=1, min_engines=1, log=said.append, fixed_weights=True)
    try:
        fleet.wait_until_ready()
        until(lambda: list(fleet.urls) == ["http://engine-4-1", "http://engine-5-1"])
        engines[1].end_with = "died"
        until(lambda: list(fleet.urls) == ["http://engine-4-1", "http://engine-5-2"])
        assert "engine 5 is started again (restart 1 of 1)" in said[0]
        assert said[1] == "engine 5 serves again (2 of 2 engines serve)"
    finally:
        fleet.stop()
