"""Refuses sbatch's options among the flags of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise

# options of sbatch that users set for a job; none is a flag of a run
_OPTIONS = set(
    "account array begin clusters comment constraint cpus-per-gpu cpus-per-task deadline dependency error "
    "exclude exclusive export gpus gpus-per-task gres hint job-name licenses mail-type mail-user mem "
    "mem-per-cpu mem-per-gpu nice no-requeue nodelist ntasks ntasks-per-node output partition priority qos "
    "requeue reservation switches wckey".split()
)
_SHORT = {
    "-A": "account", "-C": "constraint", "-J": "job-name", "-M": "clusters", "-e": "error", "-o": "output",
    "-p": "partition", "-q": "qos", "-w": "nodelist", "-x": "exclude",
}  # fmt: skip


def check_words(argv: Sequence[str]) -> None:
    """ValueError for an option of sbatch among a run's flags."""
    for word, behind in pairwise([*argv, "--"]):
        given, equals, value = word.partition("=")
        name = _SHORT.get(given, given.removeprefix("--"))
        if given.startswith("-") and name in _OPTIONS:
            value = value if equals else "" if behind.startswith("-") else behind
            told = shlex.quote(f"{name}={value}" if value else name)
            raise ValueError(
                f"{given} is an option of sbatch: megatron-vespo submit hands it on, --sbatch {told}"
            )
