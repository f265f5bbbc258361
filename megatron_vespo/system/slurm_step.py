"""This process's place in a SLURM step, by SLURM's variables. For tasks of srun, not sbatch scripts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

SCONTROL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Step:
    """A step of several tasks. Task 0 is on the first node."""

    rank: int
    size: int
    local_rank: int
    word: str  # names this step among all of the cluster
    nodes: str  # compressed list; the first has rank 0


def current_step(env: Mapping[str, str] = os.environ) -> Step | None:
    """None for a process that srun has not started, such as the shell of an sbatch script."""
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
    """A variable as a number. ValueError if it is no number, or is missing without a default."""
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(f"environment variable {name} is {text!r}, must be a number")
    return int(text)


def _nodes(env: Mapping[str, str]) -> str:
    """A step's nodes. On all components of a heterogeneous job: the first one's, as the list is sorted."""
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
