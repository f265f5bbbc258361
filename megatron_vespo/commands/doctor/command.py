"""`megatron-vespo doctor`: runs all checks and prints one table; the exit code is 1 if a check FAILs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from megatron_vespo.arguments.checks import check_output_file
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.commands.doctor import machine, processes, shared_folder, traps
from megatron_vespo.commands.doctor.finding import Check, Finding, run_checks, with_deadline
from megatron_vespo.commands.doctor.gpus import gpus, has_gpu_files, num_gpus
from megatron_vespo.commands.doctor.meeting import Guest, Host, Meeting, MeetingError
from megatron_vespo.commands.doctor.network import all_reduce
from megatron_vespo.commands.doctor.packages import package
from megatron_vespo.commands.doctor.patches import patches
from megatron_vespo.commands.doctor.table import as_text, lines_of
from megatron_vespo.commands.doctor.versions import OPTIONAL, TESTED, python_version
from megatron_vespo.system.disk import write_atomically
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.settings import Settings
from megatron_vespo.system.slurm_step import Step, current_step, first_host
from megatron_vespo.system.time_limits import IMPORT_TIMEOUT_S

QUICK_S = 30.0
ARRIVAL_S = 120.0
LOCAL_S = 2 * IMPORT_TIMEOUT_S  # parallel imports share the cores
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class DoctorOptions(Settings):
    shared_dir: Path  # absolute
    json: Path | None  # file for all findings


def main(argv: list[str]) -> int:
    options = _parse(argv)
    step = current_step()
    if sys.stderr.isatty():
        print("packages are imported and networks tried: about a minute", file=sys.stderr)
    try:
        host, meeting = _meet(step)
    except (MeetingError, RuntimeError) as error:
        name = f"{socket.gethostname()} (rank {step.rank})" if step else socket.gethostname()
        lonely = Finding("processes", "FAIL", str(error), "can this node reach the first one's ports?")
        return _report(options, {name: [lonely, *_local(options.shared_dir)]})
    try:
        found = _examine(options, step, host, meeting)
        all_found = meeting.exchange({"host": socket.gethostname(), "findings": found}, LOCAL_S)
    except MeetingError as error:
        print(f"megatron-vespo doctor: {error}", file=sys.stderr)
        return 1
    finally:
        meeting.close()
    findings: dict[str, list[Finding]] = {}
    for rank, answer in sorted(all_found.items()):
        name = answer["host"] if answer["host"] not in findings else f"{answer['host']} (rank {rank})"
        findings[name] = [Finding(**fields) for fields in answer["findings"]]
    return _report(options, findings, meeting.rank == 0)


def _parse(argv: list[str]) -> DoctorOptions:
    parser = FlagParser(
        prog="megatron-vespo doctor",
        description="Check this machine, or, started by srun, all nodes of the step.",
    )
    parser.add_argument("--shared-dir", type=user_path, default=Path(), metavar="DIR",
                        help="folder that all nodes share; default: the current one")  # fmt: skip
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="write all findings of all nodes there"
    )
    args = parser.parse_args(argv)
    check_output_file("--json", args.json)
    shared_dir = Path(os.path.abspath(args.shared_dir))  # does not touch the file system, which may hang
    return DoctorOptions.of(args, shared_dir=shared_dir)


def _meet(step: Step | None) -> tuple[str, Meeting]:
    """Rank 0's host, and the connection to all other ranks."""
    if step is None or step.size == 1:
        return LOOPBACK, Meeting()
    host = first_host(step.nodes)
    if step.rank == 0:
        return host, Host(step.size, step.word, ARRIVAL_S)
    return host, Guest(step.rank, step.size, step.word, host, ARRIVAL_S)


def _examine(options: DoctorOptions, step: Step | None, host: str, meeting: Meeting) -> list[dict]:
    """This process's findings as dictionaries, those of the checks across the step included."""
    # all tasks of a node share its machine: only one of them checks it
    found = _local(options.shared_dir) if step is None or step.local_rank == 0 else []
    meeting.exchange(None, LOCAL_S + QUICK_S)
    if meeting.rank == 0 and meeting.size > 1:
        found.insert(0, judge_processes(meeting))
    found.append(_shared(options.shared_dir, step.word if step else str(os.getpid()), meeting))
    offsets = meeting.clock_offsets(QUICK_S)
    if meeting.size > 1:
        found.append(judge_clock(offsets.get(meeting.rank, 0.0)))
    workers = {"gloo": 2 if meeting.size == 1 else 1, "nccl": num_gpus()}
    for backend, number in workers.items():
        finding = all_reduce(meeting, backend, number, host)
        if finding is not None:
            found.append(finding)
    return [asdict(finding) for finding in found]


def _local(folder: Path) -> list[Finding]:
    """Findings of the checks that need only this machine."""
    packages = dict.fromkeys([*TESTED, *OPTIONAL])
    del packages["python"]
    checks = [Check("python", python_version, QUICK_S)]
    checks += [Check(name, partial(package, name), LOCAL_S) for name in packages]
    checks += [
        Check("patches", patches, LOCAL_S),
        Check("GPUs", gpus, LOCAL_S),
        Check("open files", machine.open_files, QUICK_S),
        Check("locked memory", machine.locked_memory, QUICK_S),
        Check("/dev/shm", machine.shared_memory, QUICK_S),
        Check("disk", partial(machine.free_disk, folder), QUICK_S),
        Check("ports", machine.free_ports, QUICK_S),
        Check("hub", traps.hub, QUICK_S),
        Check("environment", partial(traps.environment, has_gpu_files()), QUICK_S),
        Check(processes.VARIABLES, processes.variables, QUICK_S),
    ]
    if has_gpu_files():
        checks.append(Check(processes.MEMORY_SAVER, processes.memory_saver, LOCAL_S))
    return run_checks(checks)


def _shared(folder: Path, word: str, meeting: Meeting) -> Finding:
    """All ranks write before any reads; all have read before any removes its own file."""
    speed = 0.0

    def write() -> Finding:
        nonlocal speed
        if not folder.is_dir():
            return Finding("shared folder", "FAIL", f"{folder}: no such folder here", shared_folder.FIX)
        speed = shared_folder.write(folder, word, meeting.rank)
        return Finding("shared folder", "ok", "")

    def remove() -> Finding:
        shared_folder.path_of(folder, word, meeting.rank).unlink(missing_ok=True)
        return Finding("shared folder", "ok", "")

    try:
        found = with_deadline("shared folder", write, QUICK_S)
        told = meeting.exchange(found.status, 2 * QUICK_S)
        writers = [rank for rank, status in told.items() if status == "ok"]
        if found.status == "ok":
            check = partial(shared_folder.check, folder, word, meeting.rank, writers, meeting.size, speed)
            found = with_deadline("shared folder", check, QUICK_S)
        meeting.exchange(None, 2 * QUICK_S)
        return found
    finally:
        with_deadline("shared folder", remove, QUICK_S)


def judge_processes(meeting: Meeting) -> Finding:
    if not meeting.absent:
        return Finding("processes", "ok", f"all {meeting.size} have come")
    ranks = ", ".join(map(str, sorted(meeting.absent)))
    fix = "are their nodes up (sinfo), and can they reach this one's ports?"
    return Finding("processes", "FAIL", f"of {meeting.size}, these have not come or gone: ranks {ranks}", fix)


def judge_clock(ahead: float) -> Finding:
    text = f"{ahead:+.3f} s against rank 0" if abs(ahead) >= SKEW_WARN_S else "the same, within a second"
    if abs(ahead) < SKEW_WARN_S:
        return Finding("clock", "ok", text)
    status = "warn" if abs(ahead) < SKEW_FAIL_S else "FAIL"
    return Finding("clock", status, text, "start chrony or ntpd: timelines and file times are wrong")


def _report(options: DoctorOptions, findings: dict[str, list[Finding]], speaks: bool = True) -> int:
    """The exit code. Only the process that `speaks` prints the table."""
    lines = lines_of(findings)
    failed = any(line.status == "FAIL" for line in lines)
    if speaks:
        print(as_text(lines, max(80, shutil.get_terminal_size((160, 40)).columns)))
        if options.json is not None:
            report = {
                "ok": not failed,
                "lines": [asdict(line) for line in lines],
                "nodes": {node: [asdict(finding) for finding in found] for node, found in findings.items()},
            }
            write_atomically(options.json, json.dumps(report, indent=2) + "\n")
    sys.stdout.flush()
    return int(failed)
