"""Assigns each process a bundle of the placement group and its GPUs. Pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Bundle:
    """Where Ray has placed a bundle: its node, and its GPU ids there (none if the run uses no GPUs)."""

    node: str
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """One process's place. It sees the GPUs `devices`, as in CUDA_VISIBLE_DEVICES; None: no change."""

    bundle: int
    devices: str | None = None


def assigned(
    blocks: Sequence[int],
    sharing: Sequence[int],
    located: Sequence[Bundle],
    engine_size: int,
    colocate: bool,
    teachers: int = 0,
) -> tuple[list[Assignment], list[Assignment], list[Assignment]]:
    """Of trainer ranks, engines and teacher engines, in bundles as `blocks.requested` asks for them."""
    trainer = trainer_assignments(blocks, located[: len(blocks)])
    end = len(located) - teachers
    of_teachers = engine_assignments(located[end:], end)
    if colocate:
        return trainer, shared_assignments(trainer, sharing, engine_size), of_teachers
    return trainer, engine_assignments(located[len(blocks) : end], len(blocks)), of_teachers


def trainer_assignments(sizes: Sequence[int], bundles: Sequence[Bundle]) -> list[Assignment]:
    """One assignment per rank; `sizes` are the numbers of ranks per bundle.

    Ranks are numbered node by node, and by GPU inside a node, so that neighbours are near each other. Nodes
    with more ranks come first, so that ranks left over by whole groups come last.
    """
    ranks_of_node: Counter[str] = Counter()
    for size, bundle in zip(sizes, bundles, strict=True):
        ranks_of_node[bundle.node] += size
    order = sorted(
        range(len(sizes)), key=lambda index: (-ranks_of_node[bundles[index].node], *_position(bundles, index))
    )
    return [
        Assignment(index, gpu) for index in order for gpu in _gpus(bundles[index]) or [None] * sizes[index]
    ]


def engine_assignments(bundles: Sequence[Bundle], first: int) -> list[Assignment]:
    """Assignments of engines that have their own bundles, numbered from `first` on."""
    order = sorted(range(len(bundles)), key=lambda index: _position(bundles, index))
    return [Assignment(first + index, _devices(_gpus(bundles[index]))) for index in order]


def shared_assignments(
    trainer: Sequence[Assignment], sharing: Sequence[int], engine_size: int
) -> list[Assignment]:
    """Assignments of engines on the trainer's GPUs; bundle b holds `sharing[b]` engines.

    The engines of a bundle take its trainer ranks' GPUs in order, `engine_size` each.
    """
    found = []
    for bundle in dict.fromkeys(rank.bundle for rank in trainer):
        gpus = [rank.devices for rank in trainer if rank.bundle == bundle and rank.devices is not None]
        for number in range(sharing[bundle]):
            found.append(Assignment(bundle, _devices(gpus[number * engine_size :][:engine_size])))
    return found


def without_gpus(assignments: Sequence[Assignment]) -> list[Assignment]:
    """The same assignments with all GPUs hidden, for a run that uses none."""
    return [replace(assignment, devices="") for assignment in assignments]


def wrong_gpus(bundles: Sequence[Bundle], sizes: Sequence[int]) -> str | None:
    """An error text if a bundle does not have as many GPUs as its size, or two bundles share a GPU."""
    taken = Counter((bundle.node, gpu) for bundle in bundles for gpu in bundle.gpus)
    right = all(len(bundle.gpus) == size for bundle, size in zip(bundles, sizes, strict=True))
    if right and max(taken.values(), default=1) == 1:
        return None
    found = [list(bundle.gpus) for bundle in bundles]
    return (
        f"Ray gives the GPUs {found} where {list(sizes)} different ones are wanted: on some node "
        "CUDA_VISIBLE_DEVICES and ray start --num-gpus disagree"
    )


def divided_groups(groups: Mapping[str, int], nodes: Sequence[str], per_node: int) -> tuple[str, ...]:
    """A line for each kind of group that would fit on a node of `per_node` GPUs but spans several.

    `nodes[i]` is the node of rank i.
    """
    lines = []
    for name, size in groups.items():
        starts = range(0, len(nodes), size)
        if size <= per_node and (number := sum(len(set(nodes[i : i + size])) > 1 for i in starts)):
            lines.append(
                f"{number} of {len(starts)} {name} groups of {size} ranks are across nodes: "
                "no node has room for a whole one"
            )
    return tuple(lines)


def _devices(gpus: Sequence[str]) -> str | None:
    return ",".join(gpus) or None


def _gpus(bundle: Bundle) -> list[str]:
    """The bundle's GPU ids in order; ids are numbers or names."""
    return sorted(bundle.gpus, key=_number)


def _number(gpu: str) -> tuple[int, str]:
    return len(gpu), gpu


def _position(bundles: Sequence[Bundle], index: int) -> tuple:
    """Sort key of a bundle: its node, in the order in which Ray has used the nodes, then its first GPU."""
    nodes = [bundle.node for bundle in bundles]
    first = min(map(_number, bundles[index].gpus), default=(0, ""))
    return nodes.index(nodes[index]), first, index
