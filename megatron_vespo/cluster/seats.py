"""Which bundle of the placement group each process gets, and which GPUs. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# of a GPU, for a trainer rank beside an engine: above a half, so that Ray gives no two ranks the same GPU
SHARED_GPU = 0.6


@dataclass(frozen=True)
class Bundle:
    """Where Ray has put one: its node, and the ids of its GPUs there (none on a machine without)."""

    node: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Seat:
    """One process's place. Ray shows it `num_gpus`; what it starts is to see `devices` instead."""

    bundle: int
    num_gpus: float = 0
    devices: str | None = None  # for CUDA_VISIBLE_DEVICES


def separate(trainer_ranks: int, engines: int, gpus_per_rank: int, gpus_per_engine: int):
    """Seats of trainer ranks and engines, where each has a bundle, and GPUs, of its own."""
    trainer = [Seat(rank, gpus_per_rank) for rank in range(trainer_ranks)]
    return trainer, [Seat(trainer_ranks + number, gpus_per_engine) for number in range(engines)]


def shared_sizes(trainer_ranks: int, engines: int, engine_size: int) -> list[int]:
    """Trainer ranks of each bundle, those with an engine first: Ray puts no bundle across nodes.

    Example: 8 ranks, 3 engines of 2 GPUs -> [2, 2, 2, 1, 1]
    """
    alone = trainer_ranks - engines * engine_size
    assert alone >= 0, f"{engines} engines of {engine_size} beside {trainer_ranks} trainer ranks"
    return [engine_size] * engines + [1] * alone


def shared(sizes: Sequence[int], engines: int, bundles: Sequence[Bundle]) -> tuple[list[Seat], list[Seat]]:
    """Seats of trainer ranks and engines, an engine on the GPUs of the ranks of its bundle.

    Ranks are numbered node by node, in a node by GPU, so that neighbours are near each other.
    """
    order = sorted(range(len(sizes)), key=lambda index: _position(bundles, index))
    trainer, with_engine = [], []
    for index in order:
        gpus = bundles[index].gpus
        assert len(gpus) in (0, sizes[index]), f"bundle {index} has GPUs {gpus} for {sizes[index]} ranks"
        trainer += [Seat(index, SHARED_GPU if gpus else 0)] * sizes[index]
        if index < engines:
            with_engine.append(Seat(index, 0, ",".join(gpus) if gpus else None))
    return trainer, with_engine


def _position(bundles: Sequence[Bundle], index: int) -> tuple:
    """Nodes in the order in which Ray has used them; ids of GPUs are numbers, or names."""
    nodes = [bundle.node for bundle in bundles]
    gpus = bundles[index].gpus
    first = min(((len(gpu), gpu) for gpu in gpus), default=(0, ""))
    return nodes.index(nodes[index]), first, index
