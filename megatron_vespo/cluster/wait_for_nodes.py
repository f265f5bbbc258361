"""`python -m megatron_vespo.cluster.wait_for_nodes ADDRESS NODES SECONDS` waits for a complete Ray cluster.

For job scripts. If it is not complete in time, prints one line and exits with code 1. The node that this runs
on counts as one of NODES.
"""

from __future__ import annotations

import logging
import sys
import time

import ray

POLL_S = 0.5


def wait_for_nodes(address: str, num_nodes: int, timeout_s: float) -> None:
    """RuntimeError if fewer than `num_nodes` are alive in time."""
    deadline = time.monotonic() + timeout_s
    alive: list[str] = []
    failure = "it does not answer"
    while len(alive) < num_nodes:
        if time.monotonic() > deadline:
            found = (
                f"has {len(alive)} nodes ({', '.join(sorted(alive))})" if alive else f"has none: {failure}"
            )
            raise RuntimeError(f"{num_nodes} nodes wanted, Ray at {address} {found}")
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        except Exception as error:  # Ray raises no narrower class before all of its processes run
            failure = " ".join(str(error).split())
        time.sleep(POLL_S)


def main() -> None:
    address, num_nodes, timeout_s = sys.argv[1:]
    try:
        wait_for_nodes(address, int(num_nodes), float(timeout_s))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
