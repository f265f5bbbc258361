"""The scripts of slurm/ as jobs: submitted, watched, and what is left of them."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import psutil

from tests.support.recipes import CONFIGS
from tests.support.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
START_S = 600.0
WAIT_S = 120.0  # for a program that does nothing
# two raylets beside each other on a small machine
RAY_OPTIONS = "--object-store-memory=200000000"
# of a second component: a script's own options are the first one's
ALL_OF_A_NODE = ("--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--mem=0")

TWO_KINDS = ["--nodes=1", ":", "--nodes=1", *ALL_OF_A_NODE]


class Job:
    """A script of slurm/, submitted from `folder`, which gets its output."""

    def __init__(self, slurm: Cluster, folder: Path, script: str, *flags: str, options=(), **variables: str):
        self.slurm, self.folder = slurm, folder
        command = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--gpus-per-node=8",
            "--time=30",
            "--output=job.log",
            *options,
        ]
        self.number = int(self.call(*command, str(ROOT / "slurm" / script), *flags, **variables))

    def call(self, *command: str, **variables: str) -> str:
        """As a user does in `folder`, with these variables."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = self.slurm.environment | {
            "VESPO_ROOT": str(ROOT), "VESPO_RAY_OPTIONS": RAY_OPTIONS, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), **variables,
        }  # fmt: skip
        return self.slurm.call(*command, cwd=self.folder, env=environment)

    @property
    def output(self) -> str:
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """Its output and what Ray said on every node, for messages."""
        files = sorted(self.folder.glob("slurm-logs/*/*"))
        return "\n".join([self.output, *(f"{file}:\n{file.read_text()[-3000:]}" for file in files)])

    def state(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def wait(self, timeout_s: float = START_S) -> dict[str, str]:
        """Until it has ended and is not queued again."""
        try:
            return self.slurm.wait_for_state(self.number, ENDED, timeout_s)
        except AssertionError as error:
            self.cancel()
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def check_end(self, timeout_s: float = WAIT_S, **expected: str) -> dict[str, str]:
        """What scontrol says in the end. Example: check_end(JobState="COMPLETED", Restarts="1")"""
        state = self.wait(timeout_s)
        print(self.output)
        assert state.items() >= expected.items(), f"{expected}: {state}\n{self.logs()}"
        return state

    def wait_for_output(self, pattern: str, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.output):
            if self.state()["JobState"] in ENDED or time.monotonic() > deadline:
                self.cancel()
                raise AssertionError(f"{pattern!r} did not appear:\n{self.logs()}")
            time.sleep(0.2)

    def ask_to_save(self) -> None:
        """As SLURM does when the time limit comes near."""
        self.slurm.call("scancel", "--batch", "--signal=USR1", str(self.number))

    def cancel(self) -> None:
        self.slurm.call("scancel", str(self.number), check=False)

    def survivors(self) -> list[psutil.Process]:
        """Processes of this job that still exist, on whatever node."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("SLURM_JOB_ID") == str(self.number)
                mine = mine and process.environ().get("SLURM_CONF") == self.slurm.environment["SLURM_CONF"]
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue  # it ended while we looked
        return found

    def nothing_left(self, timeout_s: float = 30.0) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.survivors():
            if time.monotonic() > deadline:
                print("left running:", [(p.pid, p.cmdline()) for p in self.survivors()])
                return False
            time.sleep(0.2)
        return True


def two_kinds(trainer: str, engines: str) -> list[str]:
    """Options of a heterogeneous job on these nodes, for instance n2 and n[1,3]."""
    sizes = ["--nodes=2" if "[" in nodes else "--nodes=1" for nodes in (trainer, engines)]
    return [sizes[0], f"--nodelist={trainer}", ":", sizes[1], f"--nodelist={engines}", *ALL_OF_A_NODE]


def recipe(path: Path, text: str) -> Path:
    """A recipe of Qwen3-8B, whose config.json lies beside it."""
    (path.parent / "config.json").write_text(json.dumps(CONFIGS["qwen3_8b"]))
    path.write_text(text)
    return path


class SubmittedJob(Job):
    """The same by `megatron-vespo submit`."""

    def __init__(self, slurm: Cluster, folder: Path, *words: str, **variables: str):
        self.slurm, self.folder = slurm, folder
        submit = [sys.executable, "-m", "megatron_vespo", "submit"]
        self.told = self.call(*submit, *words, "--sbatch", "output=job.log", **variables)
        self.number = int(re.search(r"^job (\d+)$", self.told, re.MULTILINE)[1])


class PastedJob(Job):
    """The command of `submit --dry-run` in a shell."""

    def __init__(self, slurm: Cluster, folder: Path, told: str):
        self.slurm, self.folder = slurm, folder
        self.number = int(self.call("bash", "-c", told.partition("\nchecked: ")[0]))


PYTHON = f"""\
#!/bin/bash
case "$*" in
    *wait_for_nodes*) # ADDRESS NODES SECONDS
        for ((i = 0; i < 10 * $5; i++)); do
            joined=("$VESPO_LOGS/attempt-$SLURM_RESTART_COUNT-"*)
            [[ ${{#joined[@]}} -ge $4 && -e ${{joined[0]}} ]] && exit 0
            sleep 0.1
        done
        exit 1
        ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""
# of Ray the scripts see that all nodes join, that the first one's port answers, and that it goes on
RAY = """\
#!/bin/bash
[[ -z ${RAY_FAILS_ON-} || $RAY_FAILS_ON != "$SLURMD_NODENAME" ]] || { echo "no Ray today"; exit 1; }
echo "$*" >"$VESPO_LOGS/attempt-$SLURM_RESTART_COUNT-$SLURMD_NODENAME"
case "$*" in
    *--head*) exec python3 -m http.server "$VESPO_RAY_PORT" ;;
    *) exec sleep 1000 ;;
esac
"""


def stub_venv(folder: Path, program: str) -> str:
    """An environment in which megatron-vespo is this bash program, and Ray a port that answers."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for name, text in {"python3": PYTHON, "ray": RAY, "megatron-vespo": f"#!/bin/bash\n{program}\n"}.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    return str(folder)


# until it is asked to save; with its number of the attempt, and what it was given
UNTIL_ASKED = """
echo "running on $SLURMD_NODENAME: $*"
trap 'echo asked $((++asked)); sleep 1; exit 75' USR1
((${SLURM_RESTART_COUNT:-0} < ${ATTEMPTS:-1})) || { echo resumed; exit 0; }
for ((i = 0; i < 600; i++)); do sleep 0.1; done
exit 9
"""
