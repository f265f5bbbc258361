"""Sends a run to Weights & Biases through the public API of its package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.observability.trackers.tracker import SAMPLE_COLUMNS, Start, State, flat, sample_table

STEP = "optimizer_step"
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}


class WandbTracker:
    """Every record is a row of its own, with the optimizer step as the x axis of all charts.

    wandb's own step cannot go back, which a run does that resumes from an earlier checkpoint.
    """

    def __init__(self, start: Start):
        import wandb  # pyright: ignore[reportMissingImports]: an optional extra

        self._wandb = wandb
        self._run = wandb.init(
            project=start.project,
            name=start.name,
            group=start.group,
            tags=list(start.tags),
            config=dict(start.config),
            id=start.run_id,
            resume="allow" if start.run_id else None,
            mode="offline" if start.offline else None,  # None: WANDB_MODE decides
            dir=os.environ.get("WANDB_DIR") or start.folder,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self.run_id: str = self._run.id
        self.where: str = self._run.url or str(Path(self._run.dir).parent)

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._run.log({STEP: step, "_timestamp": time, **metrics})

    def note(self, step: int, title: str, text: str) -> None:
        levels = self._wandb.AlertLevel
        level = levels.WARN if title.startswith("alarm") else levels.INFO
        self._run.alert(title=title, text=f"step {step}: {text}", level=level)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self._wandb.Table(
            columns=list(SAMPLE_COLUMNS), data=sample_table(rows), allow_mixed_types=True
        )
        self._run.log({STEP: step, "samples": table})

    def finish(self, state: State, summary: Mapping[str, Any], files: Sequence[Path]) -> None:
        self._run.summary.update(flat(summary))
        documents = [path for path in files if path.suffix != ".png"]
        for path in files:
            if path.suffix == ".png":
                self._run.log({path.stem: self._wandb.Image(str(path))})
        if documents:
            artifact = self._wandb.Artifact(f"report-{self.run_id}", type="report")
            for path in documents:
                artifact.add_file(str(path), name=path.name)
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=EXIT_CODES[state])
