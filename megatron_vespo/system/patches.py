"""Asks patches/apply.py whether the diffs in patches/ are applied."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import megatron_vespo

APPLY = Path(megatron_vespo.__file__).parents[1] / "patches" / "apply.py"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class PatchState:
    """Whether the diffs are applied. `error` is set if that is unknown or something else is wrong."""

    applied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""
    found: bool = True  # False: this package has no patches/ beside it

    def __str__(self) -> str:
        if not self.found:
            return "no patches folder beside this package: cannot tell"
        if self.missing:
            return f"not applied: {', '.join(self.missing)}"
        return self.error or f"all {len(self.applied)} applied"


def patch_state(apply: Path = APPLY) -> PatchState:
    if not apply.is_file():
        return PatchState(found=False)
    command = [sys.executable, str(apply), "check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    return read_check(done.returncode, done.stdout, done.stderr)


def read_check(status: int, output: str, errors: str) -> PatchState:
    """The state that `patches/apply.py check` printed."""
    lines = output.splitlines()
    applied = tuple(line.split()[-1] for line in lines if line.startswith("applied:"))
    if status == 0:
        return PatchState(applied)
    if missing := tuple(line.split()[-1] for line in lines if line.startswith("not applied:")):
        return PatchState(applied, missing)
    said = (errors.strip().splitlines() or ["nothing said"])[-1].removeprefix("patches: ")
    return PatchState(applied, error=said)
