"""The process of one tracker: `python -m megatron_vespo.observability.trackers.child wandb`.

It reads messages from standard input, one JSON object per line: {"kind": "start", ...} with the fields of
`Start`, then "log", "note", "samples" and "finish" with the arguments of that method of `Tracker`. It replies
on standard output: {"started": id, "where": text} once, {"done": number of messages} after each message,
{"problem": one line} at the first problem, and {"finished": true}. Packages print to standard error.

If the input ends without "finish", the driver has died: the run ends as failed, and so does this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_vespo.observability.trackers.tracker import Start, Tracker

ORPHAN_S = 10.0  # for the end of the run if the driver has died
NICENESS = 10
EXIT_NO_TRACKER = 3


def make_tracker(name: str) -> Callable[[Start], Tracker]:
    if name == "wandb":
        from megatron_vespo.observability.trackers.wandb_tracker import WandbTracker as Found
    elif name == "mlflow":
        from megatron_vespo.observability.trackers.mlflow_tracker import MlflowTracker as Found
    else:
        from megatron_vespo.observability.trackers.swanlab_tracker import SwanlabTracker as Found
    return Found


def serve(
    make: Callable[[Start], Tracker], messages: Iterable[str], reply: Callable[[dict[str, Any]], None]
) -> int:
    """Hands every message to the tracker, also after one that failed; returns the exit code."""
    tracker, told = None, False
    for number, line in enumerate(messages, start=1):
        message = json.loads(line)
        kind = message.pop("kind")
        try:
            if kind == "start":
                tracker = make(Start(**message))
                reply({"started": tracker.run_id, "where": tracker.where})
            else:
                assert tracker is not None, "the first message is start"
                _hand_over(tracker, kind, message)
        except (Exception, SystemExit) as error:  # a package may raise anything
            traceback.print_exc()
            if not told:
                text = " ".join(str(error).split())[:300]
                gone = "" if tracker else ", the run continues without it"
                reply({"problem": f"{type(error).__name__}: {text}{gone}"})
                told = True
            if tracker is None:
                return EXIT_NO_TRACKER
        reply({"done": number})
        if kind == "finish":
            reply({"finished": True})
            return 0
    if tracker is not None:
        tracker.finish("failed", {}, [])
    return 1


def _hand_over(tracker: Tracker, kind: str, message: dict[str, Any]) -> None:
    if kind == "finish":
        message["files"] = [Path(path) for path in message["files"]]
    assert kind in ("log", "note", "samples", "finish"), kind
    getattr(tracker, kind)(**message)


def _until_the_end(messages: Iterable[str]) -> Iterator[str]:
    """The messages. When they end, so does this process, soon."""
    yield from messages
    _end_within(ORPHAN_S)


def _end_within(seconds: float) -> None:
    """After so many seconds kills this process and its own children, which are its process group."""
    timer = threading.Timer(seconds, _kill_group)
    timer.daemon = True
    timer.start()


def _kill_group() -> None:
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def private_streams() -> tuple[TextIO, TextIO]:
    """Standard input and output for this module alone: packages find an empty input and standard error."""
    messages, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return messages, replies


def main() -> None:
    # The driver says when a run ends. A scheduler's or a terminal's signal is for the driver alone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    messages, replies = private_streams()

    def reply(content: dict[str, Any]) -> None:
        try:
            print(json.dumps(content), file=replies, flush=True)
        except BrokenPipeError:
            pass  # the driver has died, which ends the messages

    code = serve(make_tracker(sys.argv[1]), _until_the_end(messages), reply)
    _end_within(ORPHAN_S)  # packages may wait in threads and at exit
    sys.exit(code)


if __name__ == "__main__":
    main()
