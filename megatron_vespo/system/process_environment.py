"""Defines the environment of trainer ranks and engines: one table, the same for all nodes of a run.

If a variable of the table is exported where the run is started, that value holds for every process on every
node. The value in the environment of a node's Ray, which its actors inherit, is ignored. So two nodes, or a
trainer rank and an engine, cannot differ by accident. Only LD_LIBRARY_PATH, which is not in the table, is
each node's own.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CUMEM = "NCCL_CUMEM_ENABLE"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
THREADS = "OMP_NUM_THREADS"
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
ALLOCATOR_NEW = "PYTORCH_ALLOC_CONF"  # torch reads both names
PAUSED_GRAPHS = "SGLANG_MEMORY_SAVER_CUDA_GRAPH"
LIBRARIES = "LD_LIBRARY_PATH"
OTHER_LOG_PROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"
NO_PROXY = ("no_proxy", "NO_PROXY")
_EXPANDABLE = re.compile(r"(^|,)\s*expandable_segments:\w+")


@dataclass(frozen=True)
class Variable:
    """A variable's value for each kind of process if the user does not export it; None: not set.

    `colocated` is an engine with --enable-memory-saver, which gives its GPU memory to the trainer.
    """

    trainer: str | None
    engine: str | None
    colocated: str | None
    why: str


TABLE: Mapping[str, Variable] = {
    CUMEM: Variable(
        "0", "0", "0",
        "NCCL's P2P transport chooses cuMem or CUDA IPC by the sender's own setting (transport/p2p.cc): "
        "processes that differ cannot be in one group on one node. SGLang sets 0 (_set_envs_and_config)",
    ),
    CONNECTIONS: Variable(
        "1", None, None,
        "before Blackwell Megatron wants 1 with tensor or context parallelism (validate_args): communication "
        "then starts before the GEMM that it overlaps with. SGLang always sets 8 itself",
    ),
    THREADS: Variable(
        "1", None, None,
        "Ray sets the CPUs of an actor, which are 1. With --optimizer-cpu-offload Adam runs on the CPU and a "
        "rank gets the node's cores divided by its GPUs. On GPUs SGLang sets its threads itself",
    ),
    ALLOCATOR: Variable(
        "expandable_segments:True", None, None,
        "packs vary in length, which fragments fixed segments. torch_memory_saver refuses this option "
        "(_sanity_checks): it is taken out of a colocated engine's value, also where the user exports it",
    ),
    ALLOCATOR_NEW: Variable(None, None, None, f"torch's newer name of {ALLOCATOR}"),
    PAUSED_GRAPHS: Variable(
        None, None, "1",
        "SGLang captures CUDA graphs in memory that it can give back (full_cuda_graph_backend.py); not set "
        "where the user chooses breakable graphs, which cannot be paused",
    ),
    OTHER_LOG_PROBS: Variable(
        None, None, None,
        "log-probs would be those before the temperature (sampler.py), not those of what was sampled: a run "
        "refuses it where it is exported",
    ),
}  # fmt: skip


def exported_values(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of the table that the user has set in the environment where the run is started.

    ValueError if the number of threads is not a number.
    """
    values = {name: env[name] for name in TABLE if env.get(name, "").strip()}
    if threads := num_threads(env):
        values[THREADS] = str(threads)
    return values


def num_threads(env: Mapping[str, str]) -> int | None:
    """The first number of OMP_NUM_THREADS, which may be a list with one number per nesting level.

    None if it is unset or empty. ValueError for anything else.
    """
    text = env.get(THREADS, "").strip()
    if not text:
        return None
    first = text.partition(",")[0].strip()
    if not (first.isascii() and first.isdecimal() and int(first) > 0):
        raise ValueError(f"{THREADS} is {text!r}: must be a positive number of threads, or unset")
    return int(first)


def trainer_environment(
    user: Mapping[str, str], *, threads: int | None = None, symmetric_memory: bool = False
) -> dict[str, str | None]:
    """Values of the table for a trainer rank; None: unset it. `user` is the result of `exported_values`.

    `threads` is the number of CPU cores for a rank whose optimizer runs on the CPU. `symmetric_memory`:
    engines run with --enable-symm-mem.
    """
    values = _defaults(user, "trainer") | {CUMEM: _cumem(user, symmetric_memory)}
    if threads is not None and THREADS not in user:
        values[THREADS] = str(threads)
    if ALLOCATOR_NEW in user:
        values[ALLOCATOR] = user.get(ALLOCATOR)
    return values


def engine_environment(
    user: Mapping[str, str],
    *,
    memory_saver: bool = False,
    pausable_graphs: bool = True,
    symmetric_memory: bool = False,
    library_path: str = "",
) -> dict[str, str | None]:
    """Values of the table, and LD_LIBRARY_PATH, for an engine; None: unset it.

    `memory_saver`: the engine runs with --enable-memory-saver. `pausable_graphs`: none of its CUDA graphs is
    breakable. `library_path` is the node's own LD_LIBRARY_PATH.
    """
    values = _defaults(user, "colocated" if memory_saver else "engine")
    values[CUMEM] = _cumem(user, symmetric_memory)
    if memory_saver:
        for name in (ALLOCATOR, ALLOCATOR_NEW):
            values[name] = without_expandable_segments(values[name] or "") or None
        if not pausable_graphs:
            values[PAUSED_GRAPHS] = user.get(PAUSED_GRAPHS)
        values[LIBRARIES] = ":".join([*filter(None, [library_path]), *cuda_libraries()]) or None
    return values


def reached_directly(host: str, env: Mapping[str, str]) -> dict[str, str]:
    """Variables with which a process on `host` calls itself without a proxy, as SGLang does with its key."""
    given = next((env[name] for name in NO_PROXY if env.get(name)), "")
    hosts = given if given.strip() == "*" else ",".join(filter(None, [given, host, "localhost", "127.0.0.1"]))
    return dict.fromkeys(NO_PROXY, hosts)


def apply(values: Mapping[str, str | None], env: Mapping[str, str]) -> dict[str, str]:
    """`env` with these values; variables whose value is None are removed."""
    return {name: value for name, value in {**env, **values}.items() if value is not None}


def apply_here(values: Mapping[str, str | None]) -> None:
    """The same for this process and its children. Call it before CUDA, NCCL or torch's allocator start."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def without_expandable_segments(options: str) -> str:
    """Example: "expandable_segments:True,max_split_size_mb:64" -> "max_split_size_mb:64"."""
    return _EXPANDABLE.sub("", options).strip(", ")


def cuda_libraries() -> list[str]:
    """Folders of the CUDA runtime that pip has installed for torch, which no loader searches.

    SGLang starts schedulers with torch_memory_saver's library in LD_PRELOAD. That library needs libcudart but
    has no path to it. If the loader does not find it, no program starts at all (exit status 127).
    """
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    found = {library.parent for place in places or () for library in Path(place).glob("*/lib/libcudart.so.*")}
    return sorted(map(str, found))


def _defaults(user: Mapping[str, str], role: str) -> dict[str, str | None]:
    return {name: user.get(name, getattr(row, role)) for name, row in TABLE.items()}


def _cumem(user: Mapping[str, str], symmetric_memory: bool) -> str:
    """One value for trainer ranks and engines: SGLang itself sets 1 if its symmetric memory is on."""
    default = TABLE[CUMEM].trainer
    assert default is not None
    return "1" if symmetric_memory else user.get(CUMEM, default)
