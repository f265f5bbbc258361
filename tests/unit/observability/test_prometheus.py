"""The endpoint for Prometheus, and the dashboard that reads it."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_vespo.observability.trackers.prometheus import HEALTH, Health, PrometheusEndpoint, metric_name

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "examples/grafana/dashboard.json"


@pytest.fixture
def endpoint():
    endpoint = PrometheusEndpoint("127.0.0.1", 0, "run-1", 80)
    yield endpoint
    endpoint.close()


def scraped(endpoint: PrometheusEndpoint) -> dict[str, float]:
    """Sample -> value, the labels without `run` in brackets."""
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for family in families:
        assert family.type == "gauge" and family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == "run-1"
            found[sample.name + "".join(f"[{value}]" for value in labels.values())] = sample.value
    return found


def test_the_newest_value_of_every_metric_is_served(endpoint):
    endpoint.record(4, 0.0, {"ratio/log_w_mean": 0.5, "time/log-probs": 2.0, "policy/version": 4.0})
    endpoint.record(
        8, 0.0, {"ratio/log_w_mean": float("nan"), "alarm/dead_share": 1.0, "policy/version": 8.0}
    )
    found = scraped(endpoint)
    assert found["vespo_ratio_log_w_mean"] != found["vespo_ratio_log_w_mean"]  # NaN
    assert found["vespo_time_log_probs"] == 2.0 and found["vespo_alarm_dead_share"] == 1.0
    assert found["vespo_step"] == 8 and found["vespo_steps_planned"] == 80
    assert 0 <= found["vespo_seconds_since_step"] < 60


def test_an_alarm_that_is_over_is_zero_after_the_next_batch(endpoint):
    endpoint.record(4, 0.0, {"alarm/dead_share": 1.0, "policy/version": 4.0})
    endpoint.record(4, 0.0, {"eval/accuracy": 0.5})
    assert scraped(endpoint)["vespo_alarm_dead_share"] == 1.0
    endpoint.record(8, 0.0, {"policy/version": 8.0})
    assert scraped(endpoint)["vespo_alarm_dead_share"] == 0.0


def test_health_is_asked_for_at_every_scrape(endpoint):
    endpoint.health = lambda: Health("train", 2, {0: 1.0, 1: 0.0}, 1, 3, 5)
    endpoint.record(4, 0.0, {"engines/serving": 2.0})  # older than what is asked
    found = scraped(endpoint)
    assert found["vespo_phase[train]"] == 1.0 and found["vespo_trainer_restarts"] == 2.0
    assert found["vespo_engine_up[0]"] == 1.0 and found["vespo_engine_up[1]"] == 0.0
    assert found["vespo_engines_serving"] == 1.0 and found["vespo_engines_lost"] == 1.0
    assert found["vespo_engines_restarts"] == 3.0 and found["vespo_engines_lost_requests"] == 5.0
    endpoint.health = lambda: Health("", 2, {})
    assert not [name for name in scraped(endpoint) if name.startswith("vespo_phase")]


def test_all_of_the_health_is_served_and_described(endpoint):
    endpoint.health = lambda: Health("train", 0, {0: 1.0})
    assert {name.partition("[")[0] for name in scraped(endpoint)} == set(HEALTH)
    page = (ROOT / "docs/guides/tracking.md").read_text()
    assert all(f"`{name}`" in page for name in HEALTH)


def test_a_taken_port_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            PrometheusEndpoint("127.0.0.1", taken.getsockname()[1], "run", 1)


def exported_patterns() -> list[str]:
    """What a run may serve: the metrics of the reference page, with their placeholders, and the health."""
    told = re.findall(r"`([a-z]+/[^`]+)`", (ROOT / "docs/reference/metrics.md").read_text())
    assert len(told) > 100
    marked = [metric_name(re.sub(r"<\w+>", "PLACEHOLDER", name)) for name in told]
    return [name.replace("PLACEHOLDER", r"\w+") for name in marked] + list(HEALTH)


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    return found + [v["query"]["query"] for v in variables if v["type"] == "query"]


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_asks_for_metrics_that_are_exported(expression):
    names = re.findall(r"\bvespo_\w+", re.sub(r"__name__=~\"[^\"]*\"", "", expression))
    assert names or "vespo_alarm_.+" in expression
    patterns = exported_patterns()
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
