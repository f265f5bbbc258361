"""Conversions that get a signal at chosen moments, each in a fork of a process that has imported everything.

    python killed_conversions.py FOLDER   # writes results.json there: what each case leaves

A moment is the n-th call of one of the functions through which every conversion passes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from megatron_vespo.checkpoints import open_files, staging
from tests.support.tiny_checkpoints import MOE, convert, random_tensors, tiny_config, write_hf

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
# a tiny model: 37 tensors are read to be written, and as many to be proven
MOMENTS = [("read", 20), ("read", 60), ("sync", 2), ("rename", 1), ("rename", 2)]


def strike(moment: tuple[str, int], signal_number: int) -> None:
    """This process gets the signal when the moment has come, before the function does its work."""
    calls = 0

    def counted(name: str, function):
        def wrapper(*arguments, **options):
            nonlocal calls
            if name == moment[0]:
                calls += 1
                if calls == moment[1]:
                    os.kill(os.getpid(), signal_number)
            return function(*arguments, **options)

        return wrapper

    open_files.OpenFiles.read = counted("read", open_files.OpenFiles.read)
    staging.sync = counted("sync", staging.sync)
    staging.Path.rename = counted("rename", staging.Path.rename)


def in_fork(work) -> int:
    """Its exit code; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(target: Path) -> str | None:
    """Of all bytes in the folder, names included; None if there is none."""
    if not target.exists():
        return None
    found = hashlib.sha256()
    for path in sorted(target.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found.update(str(path.relative_to(target)).encode() + path.read_bytes())
    return found.hexdigest()


def case(room: Path, sources: tuple[Path, Path], command: str, name: str, moment, force: bool) -> dict:
    """The old checkpoint, if there is one, is made from other weights than the new one."""
    room.mkdir()
    target, (new, old) = room / "target", sources
    if force:
        assert in_fork(lambda: convert(command, old, target)) == 0
    before = state(target)
    words = (command, new, target, *(["--force"] if force else []))

    def struck() -> int:
        strike(moment, SIGNALS[name])
        return convert(*words)

    code = in_fork(struck)
    after, left = state(target), sorted(path.name for path in room.iterdir())
    again = in_fork(lambda: convert(*words))
    return {
        "command": command, "signal": name, "moment": moment, "force": force, "code": code, "left": left,
        "before": before, "after": after, "again": again, "end": sorted(path.name for path in room.iterdir()),
        "same": in_fork(lambda: convert("verify", target, new)),
    }  # fmt: skip


def main(folder: Path) -> None:
    # a shell starts what runs in its background deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.flush()
    os.dup2(2, 1)  # what the command prints is of no interest
    os.fsync = lambda descriptor: None  # slow, and the machine stays on
    config = tiny_config(MOE)
    hf = tuple(
        write_hf(folder / name, config, random_tensors(config, torch.bfloat16, seed))
        for seed, name in enumerate(("new", "old"))
    )
    megatron = (folder / "new megatron", folder / "old megatron")
    for pair in zip(hf, megatron, strict=True):
        assert convert("hf-to-megatron", *pair) == 0  # here, so that forks find everything imported
    results, number = [], 0
    for command, sources in (("hf-to-megatron", hf), ("megatron-to-hf", megatron)):
        for name in SIGNALS:
            for force in (False, True):
                for moment in MOMENTS:
                    if name == "interrupt" and (force or moment[0] != "read"):
                        continue  # the same handler as for "terminate"
                    if moment == ("rename", 2) and not force:
                        continue  # there is no second one
                    number += 1
                    results.append(case(folder / f"room {number}", sources, command, name, moment, force))
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
