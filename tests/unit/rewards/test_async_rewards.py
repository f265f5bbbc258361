"""Asynchronous reward functions in the reward workers: overlap, deadlines, and what blocks the event loop."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_vespo.rewards.loading import load_reward_function
from megatron_vespo.rewards.pool import RewardItem, RewardPool, RewardResult

REPOSITORY = Path(__file__).resolve().parents[3]
FUNCTION = "tests.support.async_rewards:by_command"
pytestmark = pytest.mark.long
LATE = RewardResult(0.0, "timeout", "no reward within 1 s")


@pytest.fixture
def start():
    """Starts a pool; all are closed at the end."""
    pools = []

    def start(num_workers=1, timeout_s=1.0, function=FUNCTION, **options) -> RewardPool:
        pools.append(RewardPool(load_reward_function(function), num_workers, timeout_s, **options))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def item(response: str, answer: str = "1", ended: bool = True) -> RewardItem:
    return RewardItem(response, answer, {}, ended)


def ok(value: float = 1.0) -> RewardResult:
    return RewardResult(value, "ok", "")


def error(detail: str) -> RewardResult:
    return RewardResult(0.0, "error", detail)


def test_what_waits_overlaps_and_comes_back_in_order(start):
    pool = start(num_workers=2, timeout_s=5.0)
    pool.score([item("pid")] * 2)
    items = [item(f"wait {0.5 - i % 7 / 100}", str(i)) for i in range(200)]
    began = time.monotonic()
    assert pool.score(items) == [ok(float(i)) for i in range(200)]
    assert time.monotonic() - began < 5.0  # one after the other: 50 s per worker


def test_an_object_may_be_asynchronous(start):
    assert start(function="tests.support.async_rewards:judge").score([item("x")] * 3) == [ok()] * 3


def test_a_response_that_waits_too_long_costs_only_itself(start):
    pool = start(timeout_s=1.0)
    pids = pool.score([item("pid")])
    items = [item("wait 0.2"), item("wait 600"), item("cut", ended=False), item("wait 0.9")]
    assert pool.score(items) == [ok(), LATE, RewardResult(0.0, "ok", "the response did not end"), ok()]
    assert pool.score([item("pid")]) == pids  # its worker lives on


def test_each_response_has_its_own_deadline_also_when_many_wait_for_a_place(start):
    # three rounds of 64, 0.7 s each, within 1 s per response
    assert start().score([item("wait 0.7")] * 192) == [ok()] * 192


@pytest.mark.parametrize("command", ["block 600", "block-in-c", "swallow"])
def test_code_that_blocks_the_loop_or_does_not_end_is_killed(start, command):
    items = [item(f"wait {0.2 + i / 20}", str(i)) for i in range(8)]
    items[5] = item(command)
    began = time.monotonic()
    results = start().score(items)
    assert time.monotonic() - began < 15.0
    assert results == [LATE if i == 5 else ok(float(i)) for i in range(8)]


def test_code_that_never_waits_runs_one_by_one_within_its_own_deadline(start):
    # 12 x 0.3 s in one event loop, with a deadline of 1 s
    assert start().score([item("work 0.3")] * 12) == [ok()] * 12


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("raise it", error("KeyError: 'it'")),
        ("cancel", error("CancelledError:")),
        ("exit 4", error("the reward function ended its process, exit status 4")),
        ("fill 800000000", error("the reward function ran out of memory, see --reward-memory-gb")),
        ("raise-late busy", RewardResult(0.0, "timeout", "no reward within 1 s: busy")),
    ],
)
def test_what_fails_costs_only_itself(start, command, result):
    items = [item("wait 0.3")] * 12
    items[3] = items[7] = item(command)
    expected = [ok()] * 12
    expected[3] = expected[7] = result
    assert start(memory_gb=0.5).score(items) == expected


def test_what_several_threads_ask_for_overlaps(start):
    pool = start(timeout_s=5.0)
    pool.score([item("pid")])
    began = time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        batches = list(threads.map(lambda i: pool.score([item("wait 0.5", str(i))] * (i % 3)), range(16)))
    assert batches == [[ok(float(i))] * (i % 3) for i in range(16)]
    assert time.monotonic() - began < 4.0  # one batch after the other: 5 s and more


def test_an_error_reaches_every_thread_that_waits(start, monkeypatch):
    pool = start()
    pool.score([item("pid")])
    monkeypatch.setattr("megatron_vespo.rewards.pool._WORKER_COMMAND", "raise SystemExit(3)")
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(pool.score, [item("exit 4"), item("wait 0.1")]) for _ in range(4)]
        for one in asked:
            with pytest.raises(RuntimeError, match="a reward worker did not start"):
                one.result(timeout=30)


DRIVER = f"""
import sys
from megatron_vespo.rewards.loading import load_reward_function
from megatron_vespo.rewards.pool import RewardItem, RewardPool
pool = RewardPool(load_reward_function("{FUNCTION}"), num_workers=1, timeout_s=1.5)
print(int(pool.score([RewardItem("pid", "", {{}}, True)])[0].value), flush=True)
pool.score([RewardItem(sys.argv[1], "", {{}}, True)])
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("command", ["block-in-c", "wait 600"])
def test_a_killed_parent_leaves_no_worker(command):
    path = os.pathsep.join(sys.path[:1] + [str(REPOSITORY)])
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, command],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    deadline = time.monotonic() + 12.0
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
