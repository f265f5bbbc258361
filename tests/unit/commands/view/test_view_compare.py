"""What the tab Compare gets: differences with intervals, and what two runs were started with."""

import asyncio
import math
import statistics

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from megatron_vespo.commands.view.compare_api import compare_runs, differing, newest_record
from megatron_vespo.commands.view.intervals import mean_interval, t_cdf, t_quantile
from megatron_vespo.commands.view.metrics_log import MetricsLog
from megatron_vespo.commands.view.runs import Run, Runs
from megatron_vespo.commands.view.server import make_app
from tests.support import run_folders

# of printed tables: freedom -> 97.5% quantile
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 9: 2.2622, 19: 2.0930, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_table(freedom):
    assert t_quantile(0.975, freedom) == pytest.approx(TABLE[freedom], abs=6e-5)


@pytest.mark.parametrize("freedom", [0.7, 1.5, 4.3, 17.9, 300.0])
@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 2.5, 6.0])
def test_the_distribution_is_the_integral_of_its_density(freedom, t):
    grid = np.linspace(0, t, 20_001)
    log_front = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_front - (freedom + 1) / 2 * np.log1p(grid**2 / freedom))
    assert t_cdf(t, freedom) == pytest.approx(0.5 + float(np.trapezoid(density, grid)), abs=1e-8)


def naive(values: list[float]) -> tuple[float, float]:
    """The same interval, written as in the book."""
    n, mean = len(values), statistics.fmean(values)
    spread = statistics.stdev(values)
    above = sum((x - mean) * (y - mean) for x, y in zip(values, values[1:], strict=False))
    r = above / sum((x - mean) ** 2 for x in values)
    r = min(1.0, max(0.0, r if n == 4 else (n * r + 1) / (n - 4)))
    effective = max(2.0, n * (1 - r) / (1 + r))
    half = t_quantile(0.975, effective - 1) * spread / effective**0.5
    return mean - half, mean + half


@pytest.mark.parametrize("number", [4, 7, 20, 200])
def test_an_interval_against_a_naive_one(number):
    walk = np.random.default_rng(number).normal(size=number)
    walk[1:] += 0.6 * walk[:-1]
    found = mean_interval(walk.tolist())
    assert (found.low, found.high) == pytest.approx(naive(walk.tolist()), rel=1e-12)
    assert found.mean == pytest.approx(walk.mean()) and found.number == number


def test_few_values_have_no_interval_and_equal_ones_none_to_speak_of():
    assert mean_interval([1.0, 2.0, 4.0]).low is None and mean_interval([1.0, 2.0, 4.0]).mean == 7 / 3
    found = mean_interval([0.5] * 10)
    assert (found.low, found.high) == (0.5, 0.5)
    assert math.isnan(mean_interval([]).mean)


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.94), (0.5, 0.91)])
def test_intervals_cover_the_truth(memory, least):
    """Of 2,000 series of 20 values. Without n' it would be 75% with a memory of 0.5."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        noise = random.normal(size=60)
        for index in range(1, 60):
            noise[index] += memory * noise[index - 1]
        found = mean_interval(noise[40:].tolist())
        held += found.low <= 0.0 <= found.high
    assert held / 2000 >= least


@pytest.fixture
def two(tmp_path) -> list[Run]:
    a = run_folders.write_run(tmp_path / "a", 30, seed=1)
    changed = {"lr": 2e-6, "output_dir": "/runs/two"}
    packages = {"numpy": "2.3.0", "torch": "2.9.0", "ray": "2.60.0"}
    b = run_folders.write_run(tmp_path / "b", 25, seed=2, gain=2.0, arguments=changed, packages=packages)
    return [Run("a", a), Run("b", b)]


def compare(runs: list[Run], last: int = 20) -> dict:
    return compare_runs(runs, [MetricsLog(run) for run in runs], last)


def test_means_of_common_steps(two):
    found = compare(two, 10)
    assert found["common"] == 25 and found["steps"] == [64, 100]
    [reward] = [row for row in found["metrics"] if row["name"] == "reward/mean"]
    rewards = [
        {r["step"]: r["reward/mean"] for r in run_folders.records(30, seed, gain) if "reward/mean" in r}
        for seed, gain in ((1, 1.0), (2, 2.0))
    ]
    steps = range(64, 101, 4)
    assert reward["a"] == pytest.approx(statistics.fmean(rewards[0][step] for step in steps))
    assert reward["b"] == pytest.approx(statistics.fmean(rewards[1][step] for step in steps))
    apart = [rewards[1][step] - rewards[0][step] for step in steps]
    assert reward["difference"] == pytest.approx(statistics.fmean(apart))
    assert (reward["low"], reward["high"]) == pytest.approx(naive(apart))
    assert reward["low"] > 0.0 and reward["number"] == 10  # b learns faster


def test_steps_that_only_one_has_and_values_that_are_no_numbers_are_left_out(tmp_path):
    runs = []
    for name, values in (
        ("a", {4: 1.0, 8: 2.0, 12: "NaN", 20: 9.0}),
        ("b", {4: 2.0, 8: 4.0, 12: 5.0, 16: 7.0}),
    ):
        (tmp_path / name).mkdir()
        run_folders.append(
            tmp_path / name,
            *(
                {"step": step, "time": 1.0, "x/y": value, "policy/version": 1.0}
                for step, value in values.items()
            ),
        )
        runs.append(Run(name, tmp_path / name))
    found = compare(runs)
    assert found["common"] == 3 and found["steps"] == [4, 12]
    [row] = found["metrics"]
    assert (row["a"], row["b"], row["difference"], row["number"], row["low"]) == (1.5, 3.0, 1.5, 2, None)
    assert found["flags"] is None  # no run-001.json


def test_runs_without_anything_in_common(two, tmp_path):
    (tmp_path / "c").mkdir()
    found = compare([two[0], Run("c", tmp_path / "c")])
    assert found["common"] == 0 and found["steps"] == found["metrics"] == [] and found["accuracy"]["b"] == []


def test_accuracy_has_the_intervals_of_its_evaluations(two):
    newest = compare(two)["accuracy"]["a"][-1]
    assert newest["step"] == 120 and newest["low"] == pytest.approx(newest["value"] - 0.04)


def test_flags_versions_and_machine_that_differ(two):
    run_folders.write_start(
        two[1].path, 2, run_folders.BEGIN + 100, arguments={"lr": 3e-6, "output_dir": "/runs/two"}
    )
    found = compare(two)
    assert found["flags"] == [
        {"name": "lr", "a": 1e-6, "b": 3e-6, "given": True},  # of the newest start
        {"name": "output_dir", "a": "/runs/one", "b": "/runs/two", "given": False},
    ]
    assert found["versions"] == found["machine"] == []
    (two[1].path / "run-002.json").unlink()
    assert [(row["name"], row["a"], row["b"]) for row in compare(two)["versions"]] == [
        ("numpy", "2.2.1", "2.3.0"), ("ray", None, "2.60.0"), ("sglang", "0.5.23", None),
    ]  # fmt: skip


def test_entries_that_only_one_has():
    assert differing({"x": None, "y": 1}, {"y": 1}) == [{"name": "x", "a": None, "b": None, "given": False}]


def test_a_record_that_is_rubbish_is_none(two):
    (two[0].path / "run-002.json").write_text("{")
    assert newest_record(two[0])["seed"] == 1234


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("a=a&b=b", 200, ""),
        ("a=a", 404, "no run"),
        ("a=a&b=b&last=0", 400, "last"),
        ("a=a&b=b&last=x", 400, "last"),
    ],
)
def test_replies(two, query, status, said):
    async def ask() -> tuple[int, dict]:
        async with TestClient(TestServer(make_app(Runs([run.path for run in two]), "t"))) as client:
            async with client.get(f"/api/compare?{query}&token=t") as reply:
                return reply.status, await reply.json()

    found, body = asyncio.run(ask())
    assert found == status and said in body.get("error", "")


@pytest.mark.parametrize("huge", [1.7e308, 1e200, -1e160])
def test_values_whose_squares_overflow_are_left_out(tmp_path, huge):
    runs = [run_folders.write_run(tmp_path / name, 6, seed=seed) for seed, name in enumerate("ab")]
    for path, sign in zip(runs, (1, -1), strict=True):
        extra = [
            {"step": 100 + i, "time": 2e9 + i, "policy/version": i, "odd": sign * huge * (i != 3)}
            for i in range(6)
        ]
        run_folders.append(path, *extra)
    chosen = [Run(path.name, path) for path in runs]
    found = compare_runs(chosen, [MetricsLog(run) for run in chosen], 20)
    [odd] = [row for row in found["metrics"] if row["name"] == "odd"]
    assert (odd["number"], odd["difference"]) == (1, 0.0)
