"""Folders that look like a run's saved steps."""

from __future__ import annotations

from pathlib import Path

from megatron_vespo.checkpoints.names import COMPLETE_NAME, TRACKER_NAME


def complete(save: Path, *steps: int) -> None:
    """Complete saves of these steps, of which the tracker names the last."""
    for step in steps:
        folder = save / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        (folder / COMPLETE_NAME).write_text(f"of step {step}")
    (save / TRACKER_NAME).write_text(str(steps[-1]))
