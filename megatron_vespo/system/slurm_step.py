"""Reads this process's place in a SLURM step from SLURM's variables. For srun tasks, not sbatch scripts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

SCONTROL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Step:
    """One task's place in a step of several tasks. Task 0 is on the first node."""

    rank: int
    size: int
    local_rank: int
    word: str  # identifies this step in the whole cluster
    nodes: str  # compressed list; the first node has rank 0


def current_step(env: Mapping[str, str] = os.environ) -> Step | None:
    """This task's step; None if srun did not start this process, as for the shell of an sbatch script."""
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    return Step(
        rank=number_of(env, "SLURM_PROCID"),
        size=number_of(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"),
        local_rank=number_of(env, "SLURM_LOCALID", 0),
        word=f"{env.get('SLURM_JOB_ID', 0)}.{env.get('SLURM_STEP_ID', 0)}",
        nodes=_nodes(env),
    )


def number_of(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable as a number. ValueError if it is not a number, or is missing and has no default."""
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(f"environment variable {name} is {text!r}, must be a number")
    return int(text)


def _nodes(env: Mapping[str, str]) -> str:
    """The step's nodes. For a step on all components of a heterogeneous job, only the first component's.

    SLURM sorts the list of such a step, so its first node need not have rank 0.
    """
    groups = range(number_of(env, "SLURM_HET_SIZE", 0))
    of_all = sum(number_of(env, f"SLURM_JOB_NUM_NODES_HET_GROUP_{group}", 0) for group in groups)
    if of_all and env.get("SLURM_STEP_NUM_NODES") == str(of_all):
        return env["SLURM_JOB_NODELIST_HET_GROUP_0"]
    return env["SLURM_STEP_NODELIST"]


def first_host(nodes: str) -> str:
    """The first host of a compressed list of nodes."""
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S
    )
    if listed.returncode:
        raise RuntimeError(f"scontrol cannot list {nodes}: {listed.stderr.strip()}")
    return listed.stdout.split()[0]
