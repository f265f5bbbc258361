"""Sends a run to SwanLab through the public API of its package."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.observability.trackers.tracker import Start, State, flat, sample_text

STATES = {"finished": "success", "failed": "crashed", "interrupted": "aborted"}


class SwanlabTracker:
    """SwanLab stamps records with the time at which they arrive, and keeps the first value of every step."""

    def __init__(self, start: Start):
        import swanlab  # pyright: ignore[reportMissingImports]: an optional extra

        self._swanlab = swanlab
        self._last_step = 0
        mode = os.environ.get("SWANLAB_MODE") or "online"
        run = swanlab.init(
            project=start.project,
            name=start.name,
            group=start.group,
            tags=list(start.tags),
            config=flat(start.config),
            id=start.run_id,
            resume="allow" if start.run_id else "never",
            mode="offline" if start.offline else mode,
            log_dir=os.environ.get("SWANLAB_LOG_DIR") or str(Path(start.folder) / "swanlog"),
        )
        self.run_id: str = run.id
        self.where = str(run.url if run.mode == "online" else run.dir)

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._last_step = max(self._last_step, step)
        self._swanlab.log(dict(metrics), step=step)

    def note(self, step: int, title: str, text: str) -> None:
        self._swanlab.log({title: self._swanlab.Text(text)}, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._swanlab.log({"samples": self._swanlab.Text(sample_text(rows))}, step=step)

    def finish(self, state: State, summary: Mapping[str, Any], files: Sequence[Path]) -> None:
        last = self._last_step
        if summary:
            text = json.dumps(summary, indent=1, default=str)
            self._swanlab.log({"summary": self._swanlab.Text(text)}, step=last)
        for path in files:
            if path.suffix == ".png":
                self._swanlab.log({path.stem: self._swanlab.Image(str(path))}, step=last)
            elif path.suffix == ".html":
                self._swanlab.log({path.stem: self._swanlab.Html(path)}, step=last)
        self._swanlab.finish(state=STATES[state])
