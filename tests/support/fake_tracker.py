"""A tracker's process for tests: `python fake_tracker.py MODE FILE` speaks the protocol of `trackers.child`.

It writes every message that it has read into FILE, and ends the file with "end" once the input is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main(mode: str, path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # as the real one does
        signal.signal(number, signal.SIG_IGN)
    if mode == "hang":  # reads nothing
        time.sleep(600)
    with path.open("a") as file:
        for number, line in enumerate(sys.stdin, start=1):
            kind = json.loads(line)["kind"]
            file.write(line)
            file.flush()
            if mode == "die" and kind == "log":
                os.kill(os.getpid(), signal.SIGKILL)
            if mode == "slow":
                time.sleep(0.05)
            if mode == "late" and kind == "finish":
                time.sleep(600)
            replies = [{"done": number}]
            if kind == "start":
                replies.insert(0, {"started": "fake-id", "where": "nowhere"})
            if mode == "raise" and kind == "log":
                replies.insert(0, {"problem": "OSError: no route to host"})
            if kind == "finish":
                replies.append({"finished": True})
            with contextlib.suppress(BrokenPipeError):  # the driver is gone, which ends the input
                for reply in replies:
                    os.write(1, json.dumps(reply).encode() + b"\n")
            if kind == "finish":
                break
        file.write("end\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
