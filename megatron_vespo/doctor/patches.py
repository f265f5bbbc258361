"""Whether the diffs in patches/ are applied, asked of patches/apply.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_vespo.doctor.finding import Finding

APPLY = Path(__file__).parents[2] / "patches" / "apply.py"
TIMEOUT_S = 120.0


def patches(apply: Path = APPLY) -> Finding:
    if not apply.is_file():
        fix = "run the doctor of a source checkout, or python patches/apply.py check in one"
        return Finding("patches", "warn", "no patches folder beside this package: cannot tell", fix)
    command = [sys.executable, str(apply), "check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    return judge_patches(done.returncode, done.stdout, done.stderr)


def judge_patches(status: int, output: str, errors: str) -> Finding:
    lines = output.splitlines()
    applied = [line for line in lines if line.startswith("applied:")]
    if status == 0:
        return Finding("patches", "ok", f"all {len(applied)} applied", alike=True)
    fix = "python patches/apply.py apply"
    if missing := [line.split()[-1] for line in lines if line.startswith("not applied:")]:
        return Finding("patches", "FAIL", f"not applied: {', '.join(missing)}", fix, alike=True)
    said = (errors.strip().splitlines() or ["nothing said"])[-1].removeprefix("patches: ")
    return Finding("patches", "FAIL", said, f"install the versions above, then {fix}", alike=True)
