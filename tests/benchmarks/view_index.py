"""The viewer on many recorded responses: seconds of the index, of pages, filters and search, and memory.

    python tests/benchmarks/view_index.py [--responses 100000] [--per-step 1000] [--mean-length 200]

It writes step files, starts `megatron-vespo view` as a user does, and asks it over HTTP while it indexes and
after that. Memory is the largest resident set of the server process. It asserts the limits that are stated in
README.md beside this file, for medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import requests

from megatron_vespo.data.step_records import FOLDER_NAME
from tests.support.step_records import write_steps
from tests.support.view_server import view_server

GROUP_SIZE = 8
REPEATS = 5
FIRST_PAGE_S, FILTER_S, MEMORY_MIB = 1.0, 0.5, 500
FILTERS = {
    "sorted by log W": {"sort": "-log_w"},
    "the last page": {"sort": "log_w", "page": "1999"},
    "sign of A": {"sign": "negative"},
    "reward and length": {"reward_min": "0.5", "length_min": "300", "sort": "length"},
    "steps": {"step_min": "40", "step_max": "60"},
    "one group": {"step_min": "50", "step_max": "50", "group": "7"},
    "source, finish reason, lag": {"source": "sums", "finish": "stop", "staleness_min": "1"},
    "log W below -0.5": {"log_w_max": "-0.5", "sort": "log_w"},
}
SEARCHES = {
    "a word in most responses": "answer",
    "two words": "boxed carry",
    "words side by side": '"so we add"',
    "a word in none": "nonexistent",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--per-step", type=int, default=1000)
    parser.add_argument("--mean-length", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="keep the step files here, or use those that are there")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="view-index-"))
    try:
        measure(args, folder)
    finally:
        if args.keep is None:
            shutil.rmtree(folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    records = folder / "run" / FOLDER_NAME
    if not records.is_dir():
        start = time.perf_counter()
        shape = {"groups": args.per_step // GROUP_SIZE, "group_size": GROUP_SIZE, "max_length": 4096}
        write_steps(records, args.responses // args.per_step, mean_length=args.mean_length, **shape)
        print(f"step files written in {time.perf_counter() - start:.0f} s")
    size = sum(path.stat().st_size for path in records.iterdir())
    print(f"{len(list(records.iterdir()))} step files, {size / 2**20:.0f} MiB")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    with view_server(folder / "run", cache=folder / "cache") as server:
        session = requests.Session()
        session.get(server.url, timeout=60)

        def ask(path: str, **params: str) -> tuple[float, dict]:
            start = time.perf_counter()
            reply = session.get(f"{server.home}api/runs/run/{path}", params=params, timeout=60)
            reply.raise_for_status()
            return time.perf_counter() - start, reply.json()

        start = time.perf_counter()
        first, answer = ask("responses")
        while_indexing = [first]
        while answer["index"]["indexed"] < answer["index"]["files"]:
            time.sleep(0.5)
            seconds, answer = ask("responses")
            while_indexing.append(seconds)
        print(f"{answer['index']['responses']} responses indexed in {time.perf_counter() - start:.1f} s")
        index_size = sum(path.stat().st_size for path in (folder / "cache").rglob("*.sqlite*"))
        print(f"index: {index_size / 2**20:.0f} MiB; memory {memory_mib(server.pid)} MiB")
        show("page while the index grows, median and worst", while_indexing)
        pages = [ask("responses")[0] for _ in range(REPEATS)]
        show("first page", pages)
        slowest = 0.0
        for name, params in FILTERS.items():
            times = [ask("responses", **params) for _ in range(REPEATS)]
            show(f"filter: {name} ({times[0][1]['total']})", [seconds for seconds, _ in times])
            slowest = max(slowest, statistics.median(seconds for seconds, _ in times))
        for name, text in SEARCHES.items():
            times = [ask("responses", text=text) for _ in range(REPEATS)]
            show(f"search: {name} ({times[0][1]['total']})", [seconds for seconds, _ in times])
        show("one response", [ask("responses/50/7")[0] for _ in range(REPEATS)])
        show("a group", [ask("groups/50/7")[0] for _ in range(REPEATS)])
        show("distributions of all steps", [ask("distributions")[0] for _ in range(REPEATS)])
        show(
            "what if, all steps",
            [ask("what_if", c1_positive="4", mini_batches="2")[0] for _ in range(REPEATS)],
        )
        memory = memory_mib(server.pid)
        print(f"memory of the server, at most: {memory} MiB; load of the machine {os.getloadavg()[0]:.1f}")
        assert statistics.median(pages) < FIRST_PAGE_S and slowest < FILTER_S and memory < MEMORY_MIB


def show(name: str, seconds: list[float]) -> None:
    print(
        f"{name}: {1000 * statistics.median(seconds):.0f} ms, at most {1000 * max(seconds):.0f} ms",
        flush=True,
    )


def memory_mib(pid: int) -> int:
    """Return the largest resident set of a process so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    raise AssertionError("no VmHWM")


if __name__ == "__main__":
    main()
