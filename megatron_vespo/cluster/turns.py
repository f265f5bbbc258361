"""Engines and trainer ranks on the same GPUs: whose turn it is, and what engines give back meanwhile.

While the trainer trains the engines have given back everything: SGLang takes the memory from under its
weights, keys and values and CUDA graphs (/release_memory_occupation; without --enable-memory-saver, as on
CPUs, it only empties its caches). Breakable graphs, which only a user's flag turns on, keep their memory. The
other graphs lie in host memory meanwhile; weights, keys and values are lost, so engines come back by a weight
sync alone: room for the weights, the weights, then room for the rest. Where the trainer computes log-probs,
saves or exports, that rest is room enough, and the weights stay.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager

from megatron_vespo.cluster.engine_fleet import EngineEndpoint, EngineFleet
from megatron_vespo.weight_sync.distributed import EngineAdmin, EnginesLostError
from megatron_vespo.weight_sync.verify import Sums, weight_sums

WEIGHTS = ("weights",)  # SGLang's names
REST = ("kv_cache", "cuda_graph")
IDLE_TIMEOUT = "?timeout=60"  # seconds, for requests that nobody waits for any more


class Turns:
    """What engines have of their memory; one that has just started has all of it.

    `trace(name, start, end)`, in nanoseconds since 1970, is told of every change.
    """

    def __init__(
        self,
        engines: EngineFleet,
        api_key: str | None,
        timeout_s: float,
        trace: Callable[[str, int, int], None],
    ):
        self._engines, self._api_key, self._timeout_s, self._trace = engines, api_key, timeout_s, trace
        self._given: dict[tuple[int, int], set[str]] = defaultdict(set)  # back, by engine and start number
        self._training = False
        self.loaded: dict[str, Sums] = {}  # by url, of engines that gave their weights back without a policy
        self.seconds = 0.0  # that all changes have taken

    def train(self) -> None:
        """The trainer's turn, from here to the end of the next weight sync."""
        with self._measured("release"):
            endpoints, self._training = self._engines.hold(), True
            self._note_loaded(endpoints)
            self._surviving(endpoints, lambda those: self.release(those, (*REST, *WEIGHTS)))

    @contextmanager
    def lent(self, give_memory_back: Callable[[], None]) -> Iterator[None]:
        """Room for the trainer in the engines' turn, too, but for steps; `give_memory_back` is its own."""
        if self._training:
            yield
            return
        with self._measured("release"):
            endpoints = self._engines.hold()
            self._surviving(endpoints, lambda those: self.release(those, REST))
        yield  # a trainer that fails in here is followed by one that starts with its turn
        give_memory_back()
        self._surviving(endpoints, lambda those: self.resume(those, REST))
        self._engines.let_go()

    def restart(self) -> None:
        """A weight sync begins: engines that have ended in the trainer's turn are started."""
        self._engines.start_waiting()

    def generate(self) -> None:
        """It has ended, all engines that run have their memory."""
        self._training = False
        self._engines.let_go()

    def resume(self, endpoints: Sequence[EngineEndpoint], tags: Sequence[str]) -> None:
        """Memory again for what engines have given back of `tags`; raises EnginesLostError."""
        wanted = {e: [tag for tag in tags if tag in self._given[_key(e)]] for e in endpoints}

        def resumed(endpoint: EngineEndpoint) -> None:
            self._given[_key(endpoint)] -= set(wanted[endpoint])

        with self._measured("resume"):
            self._ask("/resume_memory_occupation", _payloads(wanted), resumed)

    def release(self, endpoints: Sequence[EngineEndpoint], tags: Sequence[str]) -> None:
        """Engines give back what they have of `tags`; raises EnginesLostError."""
        there = {e: [tag for tag in tags if tag not in self._given[_key(e)]] for e in endpoints}
        payloads = _payloads(there)
        # SGLang's scheduler dies of an assertion where it still has something to do
        self._ask("/abort_request", dict.fromkeys(payloads, {"abort_all": True}))
        self._ask("/flush_cache" + IDLE_TIMEOUT, dict.fromkeys(payloads, {}))
        self._ask("/release_memory_occupation", payloads, lambda e: self._given[_key(e)].update(there[e]))

    def _note_loaded(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """The first weight check compares with it what the trainer has loaded."""

        def note(endpoints: Sequence[EngineEndpoint]) -> None:
            for endpoint in endpoints:
                if endpoint.fresh and endpoint.url not in self.loaded:
                    with self._admin([endpoint]) as admin:
                        [self.loaded[endpoint.url]] = weight_sums(admin)

        self._surviving(endpoints, note)

    def _surviving(
        self, endpoints: Sequence[EngineEndpoint], action: Callable[[Sequence[EngineEndpoint]], None]
    ) -> None:
        """`action` on the engines without those that it finds lost; they are started again later."""
        lost: dict[str, str] = {}
        while True:
            try:
                action([endpoint for endpoint in endpoints if endpoint.url not in lost])
                return
            except EnginesLostError as error:
                lost |= error.lost
                for endpoint in endpoints:
                    if endpoint.url in error.lost:
                        self._engines.lose(endpoint, error.lost[endpoint.url])

    def _ask(
        self,
        path: str,
        payloads: Mapping[EngineEndpoint, dict],
        done: Callable[[EngineEndpoint], None] | None = None,
    ) -> None:
        """All at once; `done` is told who has answered well, also where others have not."""
        if not payloads:
            return
        with self._admin(list(payloads)) as admin:
            calls = {e: admin.submit(e.url, path, payload) for e, payload in payloads.items()}
            futures.wait(calls.values())
            for endpoint, call in calls.items():
                if done is not None and call.exception() is None:
                    done(endpoint)
            admin.wait(list(calls.values()))

    @contextmanager
    def _admin(self, endpoints: Sequence[EngineEndpoint]) -> Iterator[EngineAdmin]:
        admin = EngineAdmin([endpoint.url for endpoint in endpoints], self._timeout_s, api_key=self._api_key)
        try:
            yield admin
        finally:
            admin.close()

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        start = time.time_ns()
        try:
            yield
        finally:
            end = time.time_ns()
            self.seconds += (end - start) / 1e9
            self._trace(name, start, end)


def _key(endpoint: EngineEndpoint) -> tuple[int, int]:
    return endpoint.number, endpoint.start


def _payloads(tags: Mapping[EngineEndpoint, list[str]]) -> dict[EngineEndpoint, dict]:
    return {endpoint: {"tags": own} for endpoint, own in tags.items() if own}
