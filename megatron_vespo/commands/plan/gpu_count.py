"""Checks whether the nodes have enough GPUs for a run: the one rule, for plans and for jobs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vespo.cluster.blocks import packed
from megatron_vespo.system.wording import counted


def too_few_gpus(
    ranks: int,
    engines: int,
    engine_size: int,
    nodes: int,
    gpus_per_node: int,
    colocate: bool = False,
    teacher_sizes: Sequence[int] = (),
) -> str | None:
    """One line about what is wrong; None if Ray can place the run.

    An engine of s GPUs is on one node, so n nodes of g GPUs hold n * (g // s) engines. Neighbouring trainer
    ranks share a node if they fit; otherwise a rank goes wherever a GPU is free (cluster/blocks.py), so only
    the sum matters. With `colocate` the engines use GPUs of trainer ranks. `teacher_sizes` are the GPUs of
    each teacher engine, which are never shared.
    """
    of_teachers, there = sum(teacher_sizes), nodes * gpus_per_node
    needed = ranks + engines * engine_size * (not colocate) + of_teachers
    have = f"{counted(nodes, 'node')} x {gpus_per_node}"
    if engines and engine_size > gpus_per_node:
        return (
            f"an engine of {engine_size} GPUs does not fit a node of {gpus_per_node}: lower --sglang-tp-size"
        )
    if max(teacher_sizes, default=0) > gpus_per_node:
        return (
            f"a teacher engine of {max(teacher_sizes)} GPUs does not fit a node of {gpus_per_node}: lower "
            "--teacher-tp-size"
        )
    if needed > there:
        left = (there - ranks - of_teachers) // engine_size * (not colocate)
        fix = f"--nodes {-(-needed // gpus_per_node)}"
        fix += f" or --rollout-engines {left}" if left > 0 else " or a smaller layout"
        return f"{needed} GPUs are needed, {have} = {there} are there: {fix}"
    if engines > (most := nodes * (gpus_per_node // engine_size)):
        return (
            f"{have} hold{'s' * (nodes == 1)} {counted(most, 'engine')} of {counted(engine_size, 'GPU')}, "
            f"none across nodes: --rollout-engines {most}"
        )
    return no_room([engine_size] * engines + list(teacher_sizes), nodes, gpus_per_node)


def no_room(sizes: Sequence[int], nodes: int, gpus_per_node: int) -> str | None:
    """One line if engines of these sizes, of which any fits a node, do not fit `nodes` together."""
    bundles = [{"GPU": size} for size in sizes]

    def fit(number: int) -> bool:
        return packed(bundles, [{"GPU": gpus_per_node}] * number) is not None

    if fit(nodes):
        return None
    enough = next(number for number in range(nodes + 1, nodes + len(sizes) + 1) if fit(number))
    gpus = ", ".join(map(str, sorted(sizes, reverse=True)))
    return (
        f"engines and teacher engines of {gpus} GPUs find no room on {counted(nodes, 'node')} x "
        f"{gpus_per_node}, none across nodes: take {enough} nodes, or another --sglang-tp-size or "
        "--teacher-tp-size"
    )
