"""Syncs the trainer's weights to all engines that run; repeats it without engines that are lost."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vespo.cluster.engine_fleet import EngineFleet
from megatron_vespo.cluster.supervised_engine import EngineEndpoint
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.weight_sync.engine_admin import EnginesLostError


class EngineSync:
    """Brings engines into service: only engines whose weights are current and checked get requests.

    Until `attach` the weights are those that the engines load themselves. `engine_size` is the number of
    ranks of one engine, `api_key` the key that engines ask for.
    """

    def __init__(
        self,
        engines: EngineFleet,
        engine_size: int,
        api_key: str | None = None,
        *,
        log: Callable[[str], None],
    ):
        self._engines, self._engine_size, self._api_key = engines, engine_size, api_key
        self._log, self._logged = log, ""
        self._trainer: TrainerGroup | None = None
        self._connected: list[tuple[int, int]] = []  # engines and their start numbers
        self._num_connections = 0

    def sync(self, policy_version: int) -> dict[str, float]:
        """Make every engine that runs serve the current weights as `policy_version`; returns metrics.

        Waits for an engine if none runs. Must not be called inside an optimizer step.
        """
        while True:
            endpoints = self._engines.endpoints()
            try:
                with self._engines.quiet():
                    metrics = self._try(endpoints, policy_version)
            except EnginesLostError as error:
                self._connected = []
                for endpoint in endpoints:
                    if endpoint.url in error.lost:
                        self._engines.lose(endpoint, error.lost[endpoint.url])
            else:
                self._engines.serve(endpoints)
                return metrics

    def is_wanted(self, while_others_serve: bool) -> bool:
        """Whether an engine waits for weights. Without `while_others_serve`: and no other engine serves."""
        if not while_others_serve and self._trainer is not None and self._engines.any_serves():
            return False
        return self._engines.any_ready()

    def metrics(self) -> dict[str, float]:
        return self._engines.metrics()

    def attach(self, trainer: TrainerGroup) -> None:
        """Take the weights from `trainer` from now on; the next sync connects its ranks."""
        self._trainer, self._connected = trainer, []

    def _try(self, endpoints: list[EngineEndpoint], policy_version: int) -> dict[str, float]:
        if self._trainer is None:
            return {}
        servers = [(endpoint.number, endpoint.start) for endpoint in endpoints]
        if servers != self._connected:
            self._num_connections += 1
            urls, fresh = [e.url for e in endpoints], [e.url for e in endpoints if e.fresh]
            way = self._trainer.connect_engines(
                urls, fresh, self._num_connections, self._engine_size, self._api_key
            )
            self._log_way(way)
            self._connected = servers
        metrics = self._trainer.sync_weights(policy_version)
        return metrics | {"sync/weight_check_seconds": self._trainer.check_weights(policy_version)}

    def _log_way(self, way: str) -> None:
        """How weights travel; once, and again when it changes."""
        if way != self._logged:
            self._log(way)
            self._logged = way
