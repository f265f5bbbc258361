"""Lets engines and trainer ranks take turns with the memory of the same GPUs.

While the trainer trains, all engines are offloaded: SGLang releases the memory of its weights, its KV cache
and its CUDA graphs (/release_memory_occupation; without --enable-memory-saver, as on CPUs, this only
empties its caches). The content of CUDA graphs waits in host memory. Breakable graphs, which only a user's
flag turns on, keep their GPU memory. Weights and KV cache are lost. Therefore only a weight sync brings
engines back: memory for the weights, the weights, then memory for the rest. To compute log-probs, save or
export, the trainer needs less memory: engines offload everything except their weights.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager

from megatron_vespo.cluster.engine_fleet import EngineFleet
from megatron_vespo.cluster.supervised_engine import EngineEndpoint
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, EnginesLostError
from megatron_vespo.weight_sync.verify import Sums, weight_sums

WEIGHTS = ("weights",)  # SGLang's names
CACHE_AND_GRAPHS = ("kv_cache", "cuda_graph")
IDLE_TIMEOUT = "?timeout=60"  # seconds, for aborted requests to end


class GpuSharing:
    """Offloads and onloads the engines. An engine that has just started has all of its memory.

    `trace(name, start, end)`, in nanoseconds since 1970, records every change.
    """

    def __init__(
        self,
        engines: EngineFleet,
        api_key: str | None,
        timeout_s: float,
        trace: Callable[[str, int, int], None],
    ):
        self._engines, self._api_key, self._timeout_s, self._trace = engines, api_key, timeout_s, trace
        # tags that are offloaded, by engine and start number
        self._offloaded: dict[tuple[int, int], set[str]] = defaultdict(set)
        self._training = False
        self.loaded: dict[str, Sums] = {}  # by url: checksums of engines offloaded before they had a policy
        self.seconds = 0.0  # duration of all changes so far

    def offload_engines(self) -> None:
        """Offload the engines until the end of the next weight sync, so that the trainer may train."""
        with self._measured("release"):
            endpoints, self._training = self._engines.hold(), True
            self._note_loaded(endpoints)
            self._without_lost(endpoints, lambda those: self.offload(those, (*CACHE_AND_GRAPHS, *WEIGHTS)))

    @contextmanager
    def engines_offloaded(self, offload_trainer: Callable[[], None]) -> Iterator[None]:
        """Inside, engines offload all but their weights: enough room for the trainer, but not for steps.

        If the trainer already has the GPUs, nothing changes. `offload_trainer` offloads it at the end.
        """
        if self._training:
            yield
            return
        with self._measured("release"):
            endpoints = self._engines.hold()
            self._without_lost(endpoints, lambda those: self.offload(those, CACHE_AND_GRAPHS))
        yield  # if the trainer fails in here, the next one begins with `offload_engines`
        offload_trainer()
        self._without_lost(endpoints, lambda those: self.onload(those, CACHE_AND_GRAPHS))
        self._engines.let_go()

    def begin_sync(self) -> None:
        """Begins a weight sync: starts the engines that ended while the trainer had the GPUs."""
        self._engines.start_waiting()

    def end_sync(self) -> None:
        """Ends the weight sync: all running engines have their memory."""
        self._training = False
        self._engines.let_go()

    def onload(self, endpoints: Sequence[EngineEndpoint], tags: Sequence[str]) -> None:
        """Give engines the memory of those `tags` that are offloaded. Raises EnginesLostError."""
        wanted = {e: [tag for tag in tags if tag in self._offloaded[_key(e)]] for e in endpoints}

        def onloaded(endpoint: EngineEndpoint) -> None:
            self._offloaded[_key(endpoint)] -= set(wanted[endpoint])

        with self._measured("resume"):
            self._ask("/resume_memory_occupation", _payloads(wanted), onloaded)

    def offload(self, endpoints: Sequence[EngineEndpoint], tags: Sequence[str]) -> None:
        """Release the memory of those `tags` that engines hold. Raises EnginesLostError."""
        there = {e: [tag for tag in tags if tag not in self._offloaded[_key(e)]] for e in endpoints}
        payloads = _payloads(there)
        # SGLang's scheduler fails an assertion if a request is still running
        self._ask("/abort_request", dict.fromkeys(payloads, {"abort_all": True}))
        self._ask("/flush_cache" + IDLE_TIMEOUT, dict.fromkeys(payloads, {}))
        self._ask("/release_memory_occupation", payloads, lambda e: self._offloaded[_key(e)].update(there[e]))

    def _note_loaded(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Record checksums of the weights that new engines loaded, for the first weight check."""

        def note(endpoints: Sequence[EngineEndpoint]) -> None:
            for endpoint in endpoints:
                if endpoint.fresh and endpoint.url not in self.loaded:
                    with self._admin([endpoint]) as admin:
                        [self.loaded[endpoint.url]] = weight_sums(admin)

        self._without_lost(endpoints, note)

    def _without_lost(
        self, endpoints: Sequence[EngineEndpoint], action: Callable[[Sequence[EngineEndpoint]], None]
    ) -> None:
        """Run `action` until it loses no engine. Lost engines are left out and restarted later."""
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
        """Send all requests at once. `done` is called for each that succeeds, even if others fail."""
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
