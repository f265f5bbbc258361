"""Decides how many trainer ranks share a bundle, so that neighbours stay on one node. Pure arithmetic.

Ray never splits a bundle, but places bundles freely. With one bundle per rank, it would be chance whether a
tensor-parallel pair lies inside a node.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_vespo.arguments.trainer import TrainerSettings
from megatron_vespo.cluster.roles import Bundle, Resources, by_role, for_trainer, shortage


def neighbours(settings: TrainerSettings) -> dict[str, int]:
    """Groups of ranks that exchange much data -> ranks per group. The most important group comes first.

    Megatron numbers the ranks of a group consecutively (its order is tp-cp-ep-dp-pp). Each group is a run of
    ranks that begins at a multiple of its size.
    """
    tensor = settings.tensor_model_parallel_size
    expert_tensor = settings.expert_tensor_parallel_size or tensor  # as Megatron does
    return {
        "tensor-parallel": tensor,
        "expert-parallel": settings.expert_model_parallel_size * expert_tensor,
        "context-parallel": tensor * settings.context_parallel_size,
    }


@dataclass(frozen=True)
class Run:
    """What to place. `groups` are `neighbours`; with `colocate` engines share the ranks' GPUs.

    `teachers` engines of `teacher_size` ranks have GPUs of their own, also with `colocate`.
    """

    ranks: int
    groups: Mapping[str, int]
    engines: int
    engine_size: int
    on_gpus: bool
    colocate: bool
    teachers: int = 0
    teacher_size: int = 1


@dataclass(frozen=True)
class Request:
    """Bundles for Ray: the blocks of trainer ranks, then one per engine, unless engines share the blocks.

    The teachers' bundles are the last ones.
    """

    blocks: list[int]  # ranks per block
    sharing: list[int]  # engines per block
    bundles: list[Bundle]
    per_node: int  # GPUs of the largest node that may hold trainer ranks


def requested(run: Run, nodes: Sequence[Resources]) -> Request:
    """The best division that fits `nodes`, their resources as Ray reports them. ValueError if none fits."""
    cluster = {name for node in nodes for name in node}
    by_role([], 0, cluster, run.colocate)
    per_node = max((int(_gpus(node)) for node in for_trainer(nodes)), default=0) if run.on_gpus else 0
    groups = list(run.groups.values())
    guests = run.engines if run.colocate else 0
    bundles: list[Bundle] = []
    for blocks in block_sizes(run.ranks, groups, max(per_node, 1), guests, run.engine_size):
        sharing = _sharing(blocks, guests, run.engine_size)
        bundles = by_role(_bundles(run, blocks, sharing), len(blocks), cluster)
        if packed(bundles, nodes) is not None:
            return Request(blocks, sharing, bundles, per_node)
    raise ValueError(_no_place(run, bundles, nodes))


def _sharing(blocks: Sequence[int], engines: int, engine_size: int) -> list[int]:
    """The number of engines in each block: as many as it can hold, from the first block on."""
    found: list[int] = []
    for size in blocks:
        found.append(min(engines - sum(found), size // engine_size))
    return found


def _bundles(run: Run, blocks: Sequence[int], sharing: Sequence[int]) -> list[Bundle]:
    """Bundles with one CPU per process, which is only Ray's bookkeeping."""
    bundles = [
        _bundle(size + engines, size * run.on_gpus) for size, engines in zip(blocks, sharing, strict=True)
    ]
    if not run.colocate:
        bundles += [_bundle(1, run.engine_size * run.on_gpus)] * run.engines
    return bundles + [_bundle(1, run.teacher_size * run.on_gpus)] * run.teachers


def _bundle(cpus: int, gpus: int) -> Bundle:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _no_place(run: Run, bundles: Sequence[Resources], nodes: Sequence[Resources]) -> str:
    """The error text; `bundles` are the smallest that the run can be divided into."""
    who = f"{run.ranks} trainer ranks"
    if run.engines:
        who += f" and {run.engines} engines of {run.engine_size} ranks{' on their GPUs' * run.colocate}"
    if run.teachers:
        who += f" and {run.teachers} teacher engines of {run.teacher_size} ranks"
    needed = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")}
    kinds = Counter(tuple(int(node.get(name, 0)) for name in ("GPU", "CPU")) for node in nodes)
    have = ", ".join(f"{number} of {gpus} GPUs and {cpus} CPUs" for (gpus, cpus), number in kinds.items())
    return (
        f"{who} find no place: they need {needed['GPU']} GPUs and {needed['CPU']} CPUs, no engine across "
        f"nodes; the Ray cluster's nodes: {have}{shortage(bundles, nodes)}"
    )


def block_sizes(
    ranks: int, groups: Sequence[int], per_node: int, engines: int = 0, engine_size: int = 1
) -> Iterator[list[int]]:
    """Ways to divide `ranks` into blocks of at most `per_node`, the best one first.

    The best ways keep all of `groups` whole, as far as they fit on a node, and have the largest blocks. Later
    ways give up groups, from the last one on. Each of the `engines` must lie inside one block.

    Example: 12, [2, 4], 8 -> [8, 4]; [4, 4, 4]; then pairs only: [8, 4]; [6, 6]; [4, 4, 4]; [2] * 6; then ...
    """
    if engines:
        groups = [engine_size, *groups]
    for unit in _units(groups, per_node):
        for size in range(per_node // unit * unit, 0, -unit):
            blocks = [size] * (ranks // size) + [ranks % size] * (ranks % size > 0)
            if sum(block // engine_size for block in blocks) >= engines:
                yield blocks
    if engines and (alone := ranks - engines * engine_size) >= 0:
        yield [engine_size] * engines + [1] * alone


def _units(groups: Sequence[int], per_node: int) -> list[int]:
    """Units of block sizes: first a multiple of all groups that fit together, then of one less, ..., 1."""
    units = [1]
    for size in groups:
        if (unit := math.lcm(units[-1], size)) <= per_node:
            units.append(unit)
    return units[::-1]


def packed(bundles: Sequence[Resources], nodes: Sequence[Resources]) -> list[int] | None:
    """The node of each bundle by Ray's PACK, if nothing else runs on the cluster; None if it finds not all.

    PACK takes the bundle with the most GPUs and the emptiest node for it. Then it fills that node with the
    other bundles that fit, larger ones first.
    """
    left = sorted(range(len(bundles)), key=lambda index: -_gpus(bundles[index]))
    free = {number: dict(node) for number, node in enumerate(nodes)}
    found: dict[int, int] = {}
    while left:
        candidates = [number for number, node in free.items() if _holds(node, bundles[left[0]])]
        if not candidates:
            return None
        number = max(candidates, key=lambda number: _gpus(free[number]))
        node = free.pop(number)
        for index in left:
            if _holds(node, bundles[index]):
                found[index] = number
                for name, amount in bundles[index].items():
                    node[name] -= amount
        left = [index for index in left if index not in found]
    return [found[index] for index in range(len(bundles))]


def _gpus(resources: Resources) -> float:
    return resources.get("GPU", 0)


def _holds(node: Resources, bundle: Resources) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in bundle.items())
