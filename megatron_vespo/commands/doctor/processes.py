"""Checks the environment that trainer ranks and engines of a run would get, and whether they can start."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping

from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.system.process_environment import (
    CONNECTIONS,
    CUMEM,
    LIBRARIES,
    PAUSED_GRAPHS,
    TABLE,
    THREADS,
    apply,
    engine_environment,
    exported_values,
    trainer_environment,
)

TIMEOUT_S = 60.0
VARIABLES, MEMORY_SAVER = "run's variables", "memory saver"
# why an exported value that differs from the table's is doubtful; messages append the table's value
DOUBTFUL = {
    CUMEM: "trainer ranks and engines both get it, but this package is made for",
    CONNECTIONS: "before Blackwell Megatron refuses tensor and context parallelism without",
    PAUSED_GRAPHS: "CUDA graphs of engines with --colocate keep their memory without",
}
# as SGLang starts a scheduler
_PRELOAD = """
import subprocess, sys, torch_memory_saver
with torch_memory_saver.configure_subprocess():
    sys.exit(subprocess.run(["/bin/true"]).returncode)
"""


def variables() -> Finding:
    return judge_variables(os.environ)


def judge_variables(env: Mapping[str, str]) -> Finding:
    """`env` is the environment in which a run would start."""
    try:
        user = exported_values(env)
    except ValueError as error:
        return Finding(VARIABLES, "FAIL", str(error), f"unset {THREADS}", alike=True)
    roles = {
        "trainer ranks": trainer_environment(user),
        "engines": engine_environment(user),
        "engines with --colocate": engine_environment(user, memory_saver=True),
    }
    told = [
        f"{role} get " + ", ".join(f"{name}={values[name]}" for name in TABLE if values[name])
        for role, values in roles.items()
    ]
    text = "; ".join(told) + (f" ({', '.join(user)} as exported)" if user else "")
    doubtful = {}
    for name, why in DOUBTFUL.items():
        usual = TABLE[name].trainer or TABLE[name].colocated
        if user.get(name, usual) != usual:
            doubtful[name] = f"{name}={user[name]}: {why} {usual}"
    if doubtful:
        text = "; ".join([*doubtful.values(), text])
        return Finding(VARIABLES, "warn", text, f"unset {' '.join(doubtful)}", alike=True)
    return Finding(VARIABLES, "ok", text, alike=True)


def memory_saver() -> Finding:
    """Checks torch_memory_saver's library: each scheduler preloads it, and it needs libcuda and libcudart."""
    if importlib.util.find_spec("torch_memory_saver") is None:
        return Finding(MEMORY_SAVER, "ok", "torch_memory_saver is not installed: no --colocate on GPUs")
    path = os.environ.get(LIBRARIES, "")
    values = engine_environment(exported_values(os.environ), memory_saver=True, library_path=path)
    done = subprocess.run(
        [sys.executable, "-c", _PRELOAD],
        env=apply(values, os.environ), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    if done.returncode == 0:
        return Finding(MEMORY_SAVER, "ok", "its library can be preloaded")
    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    fix = f"put the folder of the missing library into {LIBRARIES}"
    return Finding(MEMORY_SAVER, "FAIL", f"no engine starts with --colocate: {said}", fix)
