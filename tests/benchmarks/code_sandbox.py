"""Programs per second of the sandbox of code rewards: scripts, and functions with their tester."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from megatron_vespo.rewards.sandbox import Limits, Sandbox

SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
NUMPY = "import numpy as np\nprint(np.arange(int(input().split()[0]) + 2).sum())"
FUNCTION = "def add(a, b):\n    return a + b"
CALLS = {"type": "calls", "function": "add", "cases": [[[n, 1], n + 1] for n in range(20)]}
MANY_CALLS = {"type": "calls", "function": "add", "cases": [[[n, 1], n + 1] for n in range(1000)]}


def script(sandbox: Sandbox, source: str) -> bool:
    return sandbox.run_script(source, "1 2\n", Limits(), time.monotonic() + 10).stdout == b"3\n"


def function(sandbox: Sandbox, tests: dict) -> bool:
    results = sandbox.run_tests(
        [FUNCTION], tests, Limits(), time.monotonic() + 10, call_timeout_s=5.0, stop_at_failure=True
    )
    return results == [True] * len(tests["cases"])


def fresh_interpreter(sandbox: Sandbox) -> bool:
    """The same script in a new interpreter, without any sandbox."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", SCRIPT], input=b"1 2\n", capture_output=True)
    return done.stdout == b"3\n"


KINDS = {
    "script": lambda sandbox: script(sandbox, SCRIPT),
    "script with numpy": lambda sandbox: script(sandbox, NUMPY),
    "function, 20 calls": lambda sandbox: function(sandbox, CALLS),
    "function, 1,000 calls": lambda sandbox: function(sandbox, MANY_CALLS),
    "new interpreter, no sandbox": fresh_interpreter,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    started = time.perf_counter()
    sandboxes = [Sandbox() for _ in range(options.workers)]
    print(f"{(time.perf_counter() - started) / options.workers:.2f} s to start a sandbox")
    rates = {}
    for kind, run in KINDS.items():

        def repeat(sandbox: Sandbox, run=run) -> int:
            end, count = time.perf_counter() + options.seconds, 0
            while time.perf_counter() < end:
                assert run(sandbox)
                count += 1
            return count

        with ThreadPoolExecutor(options.workers) as threads:
            rates[kind] = sum(threads.map(repeat, sandboxes)) / options.seconds
        print(f"{kind:30s}{rates[kind]:8.1f} programs per second, {options.workers} workers")
    for sandbox in sandboxes:
        sandbox.close()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps(rates | {"peak MiB of a process": peak}))


if __name__ == "__main__":
    main()
