"""Records what was run as run-001.json in the output folder; a resume writes run-002.json, and so on.

started     UTC
folder      the working directory, from which the command's relative paths start
command     as it was typed; keys and passwords are left out, here and below
recipes     the flags in every file of --recipe
resumed_from, went_back_to   the checkpoint, if any
changed     arguments that differ from the defaults of this program and of Megatron
seed
source      commit of the checkout that this package is in, and whether it had changes
packages    every installed package with its version; `patches` says whether this program's are applied
machine     where the command was started; `nodes` are those of the Ray cluster
environment the exported variables of process_environment.TABLE, and what trainer ranks and engines get
arguments   all arguments, also derived ones
outcome     at the end: how (finished, alarm, preempted, interrupted or failed), message, ended (UTC)
idle, trainer_restarts   at the end: what trainer and engines waited for; when and why the trainer restarted
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import megatron_vespo
from megatron_vespo.arguments.recipe import read_recipe, recipe_files
from megatron_vespo.rollout.server_arguments import has_symmetric_memory
from megatron_vespo.system.disk import write_atomically
from megatron_vespo.system.hardware import runs_on_gpus
from megatron_vespo.system.patches import patch_state
from megatron_vespo.system.process_environment import engine_environment, exported_values, trainer_environment

LEFT_OUT = "<left out>"
ROOT = Path(megatron_vespo.__file__).parents[1]
TIMEOUT_S = 20.0
GIB = 2**30
_SECRET = re.compile(r"--(?!engine-api-key)(.*-)?api-key|--.*(password|secret|access-token|auth-token)")


class RunRecord:
    """The file of one start of a run. `add` rewrites it with more content."""

    def __init__(self, output_dir: Path, content: Mapping[str, Any]):
        self.path, self._content = _next_path(output_dir), dict(content)
        self.add()

    def add(self, **more: Any) -> None:
        self._content |= more
        write_atomically(self.path, json.dumps(self._content, indent=1) + "\n")


def describe_run(args: Mapping[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The record of a run with these arguments, as of now; `parser` has the flags with their defaults."""
    defaults = {action.dest: action.default for action in parser._actions}
    arguments = {name: _plain(name, value) for name, value in sorted(args.items())}
    exported = exported_values(os.environ)
    symmetric = has_symmetric_memory(args["sglang_flags"])
    saver = args.get("colocate", False) and runs_on_gpus(args["distributed_backend"])
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": os.getcwd(),
        "command": shlex.join(without_secrets(sys.argv)),
        "recipes": _recipes(sys.argv),
        "changed": {
            name: value
            for name, value in arguments.items()
            if name in defaults and value != _plain(name, defaults[name])
        },
        "seed": args["seed"],
        "source": source_commit(ROOT),
        "packages": _packages(),
        "patches": str(patch_state()),
        "machine": _machine(),
        "environment": {
            "exported": exported,
            "trainer": trainer_environment(exported, symmetric_memory=symmetric),
            "engines": engine_environment(exported, memory_saver=saver, symmetric_memory=symmetric),
        },
        "arguments": arguments,
    }


def _packages() -> dict[str, str]:
    """Installed packages. Broken ones may lack a version; those without a name are left out."""
    found = {part.name: part.version or "unknown" for part in distributions() if part.name}
    return dict(sorted(found.items()))


def _recipes(words: Sequence[str]) -> dict[str, str]:
    return {str(path): shlex.join(without_secrets(read_recipe(path))) for path in recipe_files(words)}


def without_secrets(words: Sequence[str]) -> list[str]:
    """The command line without its keys and passwords.

    Example: ["--api-key", "x", "--lr=1"] -> ["--api-key", "<left out>", "--lr=1"]
    """
    kept, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = _SECRET.fullmatch(name) is not None
        kept.append(LEFT_OUT if hide else f"{name}={LEFT_OUT}" if secret and equals else word)
        hide = secret and not equals
    return kept


def _plain(name: str, value: Any) -> Any:
    """`value` in a form that JSON can hold."""
    if value is not None and _SECRET.fullmatch("--" + name.replace("_", "-")):
        return LEFT_OUT
    if name == "sglang_flags" and value is not None:
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain("", inner) for inner in value]
    finite = isinstance(value, float) and abs(value) < float("inf")
    return value if finite or value is None or isinstance(value, bool | int | str) else str(value)


def source_commit(root: Path) -> dict[str, Any] | None:
    """{"commit": hash, "changed": files that differ from it} of a git checkout; None if `root` is none."""
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}


def _machine() -> dict[str, Any]:
    query = "--query-gpu=name,memory.total,driver_version"
    gpus = _output("nvidia-smi", query, "--format=csv,noheader") or ""
    processors = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = re.findall(r"^model name\s*: (.*)$", processors, re.MULTILINE)
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": gpus.splitlines(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _output(*command: str) -> str | None:
    """The output of a program; None if it is missing, fails or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _next_path(output_dir: Path) -> Path:
    taken = [path.stem.removeprefix("run-") for path in output_dir.glob("run-*.json")]
    number = max((int(number) for number in taken if number.isdecimal()), default=0) + 1
    return output_dir / f"run-{number:03d}.json"
