"""Runs commands in forks of one process that has imported everything, each in milliseconds.

A line of stdin is a case: {"argv", "env", "folder", "deadline"}. The answer on stdout has its "code", None
where it did not end in time, "out", "err" and "seconds". What would start Ray, engines or processes on a
cluster ends the case there, with the code ACCEPTED: until then a mistake has to be refused.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
import warnings

ACCEPTED = 77
STARTS = {
    "megatron_vespo.commands.train": "Services",
    "megatron_vespo.commands.evaluate.command": "serving",
    "megatron_vespo.commands.check_layout.command": "start_ray",
    "megatron_vespo.commands.smoke.command": "start_ray",
    "megatron_vespo.commands.doctor.command": "_meet",
}
OTHERS = (
    "megatron.training.arguments", "megatron_vespo.trainer.meta_model", "matplotlib.figure",
    "pyarrow.parquet",
)  # fmt: skip


def accept(*args: object, **options: object) -> None:
    sys.stdout.flush()
    os._exit(ACCEPTED)


def import_everything() -> None:
    with warnings.catch_warnings(action="ignore"):
        import importlib

        from megatron_vespo.system.plugins import prepare_for_megatron

        for module, name in STARTS.items():
            setattr(importlib.import_module(module), name, accept)
        for command in ("convert", "plan", "prepare_data", "simulate", "submit"):
            importlib.import_module(f"megatron_vespo.commands.{command}.command")
        importlib.import_module("megatron_vespo.commands.args")
        prepare_for_megatron()
        for module in OTHERS:
            importlib.import_module(module)


def run_here(case: dict, out: int, err: int) -> None:
    from megatron_vespo.commands import main as cli

    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(case["folder"])
    os.environ.clear()
    os.environ.update(case["env"])
    tempfile.tempdir = case["folder"]
    sys.argv = ["megatron-vespo", *case["argv"]]
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run(case: dict) -> dict:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        with warnings.catch_warnings(action="ignore"):  # of threads: they wait for work
            child = os.fork()
        if not child:
            run_here(case, out.fileno(), err.fileno())
        ended = os.pidfd_open(child)
        code = None
        if select.select([ended], [], [], case["deadline"])[0]:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(ended)
        try:
            os.killpg(child, signal.SIGKILL)  # with what it has started
        except ProcessLookupError:
            pass
        if code is None:
            os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    return {"code": code, "out": texts[0], "err": texts[1], "seconds": time.monotonic() - started}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
