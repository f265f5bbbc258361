"""Checks whether the diffs in patches/ are applied."""

from __future__ import annotations

from pathlib import Path

from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.system.patches import APPLY, PatchState, patch_state


def patches(apply: Path = APPLY) -> Finding:
    return judge_patches(patch_state(apply))


def judge_patches(state: PatchState) -> Finding:
    if not state.found:
        fix = "run the doctor of a source checkout, or python patches/apply.py check in one"
        return Finding("patches", "warn", str(state), fix)
    if not state.missing and not state.error:
        return Finding("patches", "ok", str(state), alike=True)
    fix = "python patches/apply.py apply"
    if not state.missing:
        fix = f"install the versions above, then {fix}"
    return Finding("patches", "FAIL", str(state), fix, alike=True)
