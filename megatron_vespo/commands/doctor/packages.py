"""Checks packages: their versions, and whether they have every name that this program uses."""

from __future__ import annotations

import json
import subprocess
import sys

from megatron_vespo.commands.doctor.finding import Finding, Status
from megatron_vespo.commands.doctor.gpus import has_gpu_files
from megatron_vespo.commands.doctor.import_check import MARK
from megatron_vespo.commands.doctor.versions import OPTIONAL, TESTED, installed
from megatron_vespo.system.time_limits import IMPORT_TIMEOUT_S

SHOWN = 2  # problems listed
_FIXES = {
    "apex": "pip uninstall apex, install NVIDIA's from its repository: PyPI's apex is another project",
    "transformer-engine": "pip install --no-build-isolation transformer-engine[core-cu13,pytorch]=="
    f"{TESTED['transformer-engine']}, or train with --transformer-impl local",
    "deep-ep": "see what its import wants, or leave --moe-token-dispatcher-type flex out",
}


def package(name: str) -> Finding:
    """Version and API of one package."""
    found = installed(name)
    fix = _FIXES.get(name) or (
        f"pip install {name}=={TESTED[name]}" if name in TESTED else f"reinstall {name}, or remove it"
    )
    if found is None and name in OPTIONAL:
        if name == "transformer-engine" and has_gpu_files():
            return Finding(name, "FAIL", "not installed: a run on GPUs is refused", fix, alike=True)
        return Finding(name, "ok", f"not installed: {OPTIONAL[name]}", alike=True)
    if found is None:
        return Finding(name, "FAIL", "not installed", fix, alike=True)
    wrong, number = _check_imports(name)
    if wrong:
        # a run works without it: Megatron and SGLang do not need DeepEP
        status: Status = "warn" if name == "deep-ep" else "FAIL"
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        return Finding(name, status, f"{found}: {'; '.join(wrong[:SHOWN])}{more}", fix, alike=True)
    text = f"{found}, {number} names as needed"
    if name in TESTED and found != TESTED[name]:
        return Finding(name, "warn", f"{text}, but tested with {TESTED[name]}", fix, alike=True)
    return Finding(name, "ok", text, alike=True)


def _check_imports(name: str) -> tuple[list[str], int]:
    """The package's problems, and how many names were checked."""
    command = [sys.executable, "-m", "megatron_vespo.commands.doctor.import_check", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [f"its import takes longer than {IMPORT_TIMEOUT_S:g} s"], 0
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            answer = json.loads(line.removeprefix(MARK))
            return answer["wrong"], answer["number"]
    last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return [f"its import ended with status {done.returncode}: {last}"], 0
