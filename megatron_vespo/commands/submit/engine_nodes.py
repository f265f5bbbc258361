"""`megatron-vespo submit --engine-nodes`: places engines on another kind of nodes than the trainer's.

They are the second component of a heterogeneous SLURM job: one job, one Ray cluster, one end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import pairwise

from megatron_vespo.commands.submit.options import SubmitOptions
from megatron_vespo.system.hardware import GPUS
from megatron_vespo.system.wording import counted


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--engine-nodes", type=int, metavar="N",
        help="so many nodes for the engines; --nodes and --gpus-per-node are the trainer's then")  # fmt: skip
    add("--engine-gpus-per-node", type=int, metavar="N", help="default: --gpus-per-node")
    add("--engine-gpu", choices=(*GPUS, "other"), help="theirs, as --gpu is the trainer's; default: --gpu")
    add("--engine-sbatch", nargs="+", action="extend", default=[], metavar="NAME[=VALUE]",
        help="options of sbatch for the engines' nodes: partition=l40s constraint=l40s. They take account, "
        "qos, reservation, time and the like from --sbatch, but nothing that says which nodes")  # fmt: skip


def check(asked: SubmitOptions, flags: Sequence[str]) -> None:
    """ValueError for incompatible flags. `flags` are the run's."""
    if asked.engine_nodes is None:
        if asked.engine_gpus_per_node is not None or asked.engine_gpu or asked.engine_sbatch:
            raise ValueError(
                "--engine-gpus-per-node, --engine-gpu and --engine-sbatch are for --engine-nodes N"
            )
        return
    if asked.engine_nodes < 1:
        raise ValueError(f"--engine-nodes {asked.engine_nodes}: must be at least 1")
    if "--colocate" in flags:
        raise ValueError("--colocate puts engines on the trainer's GPUs: leave it or --engine-nodes out")


def check_words(argv: Sequence[str]) -> None:
    """ValueError for options of sbatch that argparse would take for its own flags."""
    for flag, word in pairwise(argv):
        if flag in ("--sbatch", "--engine-sbatch") and word.startswith("--"):
            raise ValueError(f"{flag} {word}: without dashes, as in {flag} partition=h100")


def component(asked: SubmitOptions) -> dict[str, str | None] | None:
    """Options of sbatch for the second component; None for a job with one component."""
    if asked.engine_nodes is None:
        return None
    options: dict[str, str | None] = {"nodes": str(asked.engine_nodes)}
    if gpus := gpus_per_node(asked):
        options["gpus-per-node"] = str(gpus)
    return options | options_of_sbatch(asked.engine_sbatch)


def gpus_per_node(asked: SubmitOptions) -> int:
    return asked.gpus_per_node if asked.engine_gpus_per_node is None else asked.engine_gpus_per_node


def all_nodes(asked: SubmitOptions) -> tuple[int, int]:
    """(nodes, GPUs per node) for a plan: what fits on the nodes of each role fits on these."""
    if asked.engine_nodes is None:
        return asked.nodes, asked.gpus_per_node
    return asked.nodes + asked.engine_nodes, max(asked.gpus_per_node, gpus_per_node(asked))


def options_of_sbatch(words: Iterable[str]) -> dict[str, str | None]:
    """Example: ["partition=h100", "--exclusive"] -> {"partition": "h100", "exclusive": None}"""
    split = (word.partition("=") for word in words)
    return {name.lstrip("-"): value if equals else None for name, equals, value in split}


def described_use(
    asked: SubmitOptions, ranks: int, engines: int, engine_size: int, teachers: Sequence[int] = ()
) -> str:
    """One line about the GPUs of each role; ValueError if its nodes have too few.

    `teachers` are the GPUs of each teacher engine, which are on the engines' nodes too.
    """
    from megatron_vespo.commands.plan.gpu_count import no_room

    ours, theirs, nodes = asked.gpus_per_node, gpus_per_node(asked), asked.engine_nodes or 0
    what = f"{counted(engines, 'engine')} of {counted(engine_size, 'GPU')}"
    if ranks > (there := asked.nodes * ours):
        raise ValueError(
            f"{ranks} trainer ranks need {ranks} GPUs, "
            f"--nodes {asked.nodes} x --gpus-per-node {ours} = {there}"
        )
    if engines > (most := nodes * (theirs // engine_size)):
        raise ValueError(
            f"{what}, each on one node: --engine-nodes {nodes} x --engine-gpus-per-node "
            f"{theirs} hold {most} of them"
        )
    of_engines, used = nodes * theirs, engines * engine_size + sum(teachers)
    if teachers:
        what += f" and {counted(len(teachers), 'teacher engine')} of {counted(teachers[0], 'GPU')}"
        if used > of_engines:
            raise ValueError(
                f"{what} need {used} GPUs, --engine-nodes {nodes} x --engine-gpus-per-node {theirs} = "
                f"{of_engines}"
            )
        if max(teachers) > theirs:
            raise ValueError(
                f"a teacher engine of {max(teachers)} GPUs does not fit a node of {theirs}: lower "
                "--teacher-tp-size"
            )
        if wrong := no_room([engine_size] * engines + list(teachers), nodes, theirs):
            raise ValueError(f"on the engines' nodes, {wrong}")
    return (
        f"checked: {counted(ranks, 'trainer rank')} use{'s' * (ranks == 1)} {ranks} of {there} GPUs, "
        f"{what} use{'s' * (engines == 1 and not teachers)} {used} of {of_engines} on nodes of their own"
    )
