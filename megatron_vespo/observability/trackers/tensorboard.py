"""Writes a run's scalars, texts and picture as TensorBoard events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]: protobuf makes it when it is imported
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardEvents:
    """One event file in `folder`. TensorBoard forgets points of earlier files from `first_step` on."""

    def __init__(self, folder: Path, first_step: int | None):
        self._events = EventFileWriter(str(folder))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def scalars(self, step: int, now: float, values: Mapping[str, float]) -> None:
        """Writes and flushes them, so that a killed run loses nothing; `now` in Unix seconds."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=now, step=step, summary=Summary(value=scalars)))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Writes a text for the Text tab."""
        readable = markdown.encode("utf-8", "backslashreplace").decode()
        # parsed anew: the package may make another class of the same message
        summary = Summary.FromString(text_pb(tag, readable).SerializeToString())
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def picture(self, step: int, tag: str, png: bytes) -> None:
        """Writes a PNG file's bytes for the Images tab."""
        image = Summary.Image(encoded_image_string=png)
        value = Summary.Value(tag=tag, image=image)
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def close(self) -> None:
        self._events.close()

    def _add(self, event: Event) -> None:
        self._events.add_event(event)
        self._events.flush()
