"""Serves the newest metrics and the health of a run to Prometheus, over HTTP."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

PREFIX = "vespo_"


@dataclass(frozen=True)
class Health:
    """The state of a run at this moment. `engines` has 1.0 for every engine that serves, else 0.0."""

    phase: str = ""
    trainer_restarts: int = 0
    engines: Mapping[int, float] = field(default_factory=dict)
    engines_lost: int = 0  # those that are given up
    engine_restarts: int = 0
    lost_requests: int = 0


# Name -> help of what is served beside the metrics
HEALTH = {
    "vespo_step": "optimizer steps done",
    "vespo_steps_planned": "optimizer steps of the whole run",
    "vespo_seconds_since_step": "seconds since the newest record of metrics, or since the start",
    "vespo_phase": "1 for the current phase of the driver",
    "vespo_trainer_restarts": "restarts of the trainer in this start of the run",
    "vespo_engine_up": "1 for an engine that serves, else 0",
    "vespo_engines_serving": "engines that serve",
    "vespo_engines_lost": "engines that were given up",
    "vespo_engines_restarts": "restarts of engines",
    "vespo_engines_lost_requests": "requests whose engine was lost",
}


def metric_name(name: str) -> str:
    """Example: "ratio/log_w_mean" -> "vespo_ratio_log_w_mean"."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)


class PrometheusEndpoint:
    """Serves /metrics on `host`:`port` until `close`. Every sample has the label `run`.

    OSError if the port cannot be opened. `health` is called in the server's thread at every scrape.
    """

    def __init__(self, host: str, port: int, run: str, steps_planned: int):
        from prometheus_client import CollectorRegistry, start_http_server

        self._run, self._steps_planned = run, steps_planned
        self.health: Callable[[], Health] = Health
        self._lock = threading.Lock()
        self._newest: dict[str, float] = {}
        self._step, self._step_at = 0, time.monotonic()
        registry = CollectorRegistry()
        self._server, self._thread = start_http_server(port, host, registry)
        registry.register(self)
        self.port: int = self._server.server_port

    def record(self, step: int, time_: float, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._newest |= {metric_name(name): value for name, value in metrics.items()}
            # an alarm that is over is absent from the next record of a batch
            if "policy/version" in metrics:
                alarms = {name for name in self._newest if name.startswith(f"{PREFIX}alarm_")}
                on = {metric_name(name) for name in metrics}
                self._newest |= dict.fromkeys(alarms - on, 0.0)
            self._step, self._step_at = step, time.monotonic()

    def collect(self) -> Iterator:
        """The samples, as prometheus_client asks for them."""
        from prometheus_client.core import GaugeMetricFamily

        with self._lock:
            newest = dict(self._newest)
            since = time.monotonic() - self._step_at
            values = {"vespo_step": float(self._step), "vespo_seconds_since_step": since}
        health = self.health()
        values |= {
            "vespo_steps_planned": float(self._steps_planned),
            "vespo_trainer_restarts": float(health.trainer_restarts),
            "vespo_engines_serving": sum(health.engines.values()),
            "vespo_engines_lost": float(health.engines_lost),
            "vespo_engines_restarts": float(health.engine_restarts),
            "vespo_engines_lost_requests": float(health.lost_requests),
        }
        for name, value in (newest | values).items():  # what is live wins
            family = GaugeMetricFamily(
                name, HEALTH.get(name, "see docs/reference/metrics.md"), labels=["run"]
            )
            family.add_metric([self._run], value)
            yield family
        phase = GaugeMetricFamily("vespo_phase", HEALTH["vespo_phase"], labels=["run", "phase"])
        if health.phase:
            phase.add_metric([self._run, health.phase], 1.0)
        yield phase
        up = GaugeMetricFamily("vespo_engine_up", HEALTH["vespo_engine_up"], labels=["run", "engine"])
        for number, serves in health.engines.items():
            up.add_metric([self._run, str(number)], serves)
        yield up

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
