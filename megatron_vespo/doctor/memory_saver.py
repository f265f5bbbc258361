"""Whether an engine that gives GPU memory back can start on this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from megatron_vespo.doctor.finding import Finding
from megatron_vespo.process_environment import LIBRARIES, apply, engine_environment, exported_values

TIMEOUT_S = 60.0
NAME = "memory saver"
# as SGLang starts a scheduler
_PRELOAD = """
import subprocess, sys, torch_memory_saver
with torch_memory_saver.configure_subprocess():
    sys.exit(subprocess.run(["/bin/true"]).returncode)
"""


def memory_saver() -> Finding:
    """torch_memory_saver's library is preloaded into each scheduler and needs libcuda and libcudart."""
    if importlib.util.find_spec("torch_memory_saver") is None:
        return Finding(NAME, "ok", "torch_memory_saver is not installed: no --colocate on GPUs")
    path = os.environ.get(LIBRARIES, "")
    values = engine_environment(exported_values(os.environ), memory_saver=True, library_path=path)
    done = subprocess.run(
        [sys.executable, "-c", _PRELOAD],
        env=apply(values, os.environ), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    if done.returncode == 0:
        return Finding(NAME, "ok", "its library can be preloaded")
    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    fix = f"put the folder of the missing library into {LIBRARIES}"
    return Finding(NAME, "FAIL", f"no engine starts with --colocate: {said}", fix)
