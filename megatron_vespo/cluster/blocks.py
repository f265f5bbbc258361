"""How many trainer ranks share a bundle, so that neighbours stay on one node. Pure arithmetic.

Ray never splits a bundle, and puts bundles where it likes. A bundle of one rank each would leave it to chance
whether a tensor-parallel pair lies inside a node.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_vespo.arguments.trainer import TrainerSettings
from megatron_vespo.cluster.roles import Bundle, Resources, by_role, for_trainer, shortage


def neighbours(settings: TrainerSettings) -> dict[str, int]:
    """Groups of ranks that exchange much data -> ranks in each. The most important group comes first.

    Megatron numbers them one after another (its order is tp-cp-ep-dp-pp): each group is a run of ranks that
    begins at a multiple of its size.
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
    """What is to be placed. `groups` are `neighbours`; with `colocate` engines share the ranks' GPUs."""

    ranks: int
    groups: Mapping[str, int]
    engines: int
    engine_size: int
    on_gpus: bool
    colocate: bool


@dataclass(frozen=True)
class Request:
    """Bundles for Ray: the blocks of trainer ranks, then, unless they share those, one for each engine."""

    blocks: list[int]  # ranks of each
    sharing: list[int]  # engines of each
    bundles: list[Bundle]
    per_node: int  # GPUs of the largest node for trainer ranks


def requested(run: Run, nodes: Sequence[Resources]) -> Request:
    """The best division that fits the nodes, of which Ray says `nodes`; ValueError where none does."""
    cluster = {name for node in nodes for name in node}
    by_role([], 0, cluster, run.colocate)
    per_node = max((int(_gpus(node)) for node in for_trainer(nodes)), default=0) if run.on_gpus else 0
    groups = list(run.groups.values())
    guests = run.engines if run.colocate else 0
    bundles: list[Bundle] = []
    for blocks in block_sizes(run.ranks, groups, max(per_node, 1), guests, run.engine_size):
        sharing = _sharing(blocks, guests, run.engine_size)
        bundles = by_role(_bundles(run, blocks, sharing), len(blocks), cluster)
        if fit(bundles, nodes):
            return Request(blocks, sharing, bundles, per_node)
    raise ValueError(_no_place(run, bundles, nodes))


def _sharing(blocks: Sequence[int], engines: int, engine_size: int) -> list[int]:
    """How many of the engines lie in each block: as many as it holds, from the first one on."""
    found: list[int] = []
    for size in blocks:
        found.append(min(engines - sum(found), size // engine_size))
    return found


def _bundles(run: Run, blocks: Sequence[int], sharing: Sequence[int]) -> list[Bundle]:
    """Of one CPU a process: that is only Ray's bookkeeping."""
    bundles = [
        _bundle(size + engines, size * run.on_gpus) for size, engines in zip(blocks, sharing, strict=True)
    ]
    if not run.colocate:
        bundles += [_bundle(1, run.engine_size * run.on_gpus)] * run.engines
    return bundles


def _bundle(cpus: int, gpus: int) -> Bundle:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _no_place(run: Run, bundles: Sequence[Resources], nodes: Sequence[Resources]) -> str:
    """`bundles` are the smallest that the run can be divided into."""
    who = f"{run.ranks} trainer ranks"
    if run.engines:
        who += f" and {run.engines} engines of {run.engine_size} ranks{' on their GPUs' * run.colocate}"
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

    The best ones keep all of `groups` whole, as far as they fit a node, and have the largest blocks; then
    groups are given up from the last one on. `engines` are to lie in the blocks, each inside one.

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
    """What blocks are to be multiples of: of all groups that fit together, of one less, ..., of 1."""
    units = [1]
    for size in groups:
        if (unit := math.lcm(units[-1], size)) <= per_node:
            units.append(unit)
    return units[::-1]


def fit(bundles: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    """Whether Ray's PACK finds a node for every bundle while nobody else is there.

    It takes the bundle with most GPUs, the emptiest node for it, and fills that node with what else fits,
    larger bundles first.
    """
    left = sorted(bundles, key=_gpus, reverse=True)
    free = [dict(node) for node in nodes]
    while left:
        candidates = [node for node in free if _holds(node, left[0])]
        if not candidates:
            return False
        node = max(candidates, key=_gpus)
        free.remove(node)
        rest = []
        for bundle in left:
            if not _holds(node, bundle):
                rest.append(bundle)
                continue
            for name, amount in bundle.items():
                node[name] -= amount
        left = rest
    return True


def _gpus(resources: Resources) -> float:
    return resources.get("GPU", 0)


def _holds(node: Resources, bundle: Resources) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in bundle.items())
