"""Checks the environment variables that decide where Ray starts, and whether it can."""

from __future__ import annotations

import os
from collections.abc import Mapping

ADDRESS = "RAY_ADDRESS"
_MOST_BYTES = 107  # in the path of an AF_UNIX socket
# the longest socket paths of Ray and of Python's multiprocessing, below the folder for temporary files
_OF_RAY = "/ray/session_2026-01-31_23-59-59_123456_{pid}/sockets/plasma_store"
_OF_OTHERS = "/pymp-abcdefgh/listener-abcdefgh"


def problem(env: Mapping[str, str]) -> tuple[str, str] | None:
    """Why a run cannot start its own Ray in this environment, and what to do; None if it can."""
    if address := env.get(ADDRESS):
        return (
            f"{ADDRESS}={address} is set and --ray-address is not given",
            f"--ray-address auto joins that cluster; unset {ADDRESS} to start a Ray on this machine",
        )
    of_ray = _OF_RAY.format(pid=os.getpid())
    needs = {"RAY_TMPDIR": of_ray, "TMPDIR": _OF_OTHERS if env.get("RAY_TMPDIR") else of_ray}
    for name, socket in needs.items():
        longest = _MOST_BYTES - len(socket)
        if (length := len(os.fsencode(env.get(name, "")))) > longest:
            return (
                f"{name} has {length} bytes: sockets below it would have paths of over {_MOST_BYTES} bytes",
                f"export {name} with at most {longest}, such as /tmp",
            )
    return None
