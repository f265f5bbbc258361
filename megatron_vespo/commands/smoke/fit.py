"""Reduces a recipe's layout to the available nodes. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vespo.system.wording import counted

SHRINKING = ("ep", "cp", "etp", "pp", "tp")  # the first one is reduced first


@dataclass(frozen=True)
class Nodes:
    """Places, one number per node: GPUs, or CPU cores on a cluster without GPUs.

    `engines` are the nodes that may hold engines: the trainer's own nodes, or with `apart` other nodes.
    """

    trainer: tuple[int, ...]
    engines: tuple[int, ...]
    on_gpus: bool
    apart: bool = False

    def __str__(self) -> str:
        nodes = [*self.trainer, *(self.engines if self.apart else ())]
        return f"{counted(len(nodes), 'node')}, {sum(nodes)} {self.place(sum(nodes))}"

    def place(self, number: int) -> str:
        return ("GPU" if self.on_gpus else "CPU core") + "s" * (number != 1)


@dataclass(frozen=True)
class Wanted:
    """Sizes of a run. `ranks` and `engines` may be None: as many as there is room for."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    ranks: int | None = None
    engines: int | None = None
    engine_size: int = 1
    colocate: bool = False

    @property
    def unit(self) -> int:
        """The number of trainer ranks is a multiple of it: attention and experts use the same ranks."""
        return self.pp * math.lcm(self.tp * self.cp, self.etp * self.ep)

    def __str__(self) -> str:
        words = ("tp", "pp", "vpp", "cp", "ep", "etp")
        layout = ",".join(f"{word}{getattr(self, word)}" for word in words if getattr(self, word) > 1)
        where = " on the same GPUs" * self.colocate
        ranks, engines = _counted(self.ranks, "rank"), _counted(self.engines, "engine")
        return f"{layout or 'tp1'} on {ranks}, {engines} of {self.engine_size}{where}"


def _counted(number: int | None, what: str) -> str:
    return f"as many {what}s as fit" if number is None else counted(number, what)


def fit(wanted: Wanted, nodes: Nodes) -> Wanted:
    """`wanted` itself if it fits; otherwise one engine per node, and the trainer on the rest.

    Sizes that still do not fit are divided, in the order of `SHRINKING`. ValueError if nothing fits.

    Example: tp2,ep8 on 16 ranks and 8 engines of 2, one node of 8 GPUs -> tp2,ep4 on 4 ranks, 1 engine of 2
    """
    if wanted.ranks is not None and wanted.engines is not None and _fits(wanted, nodes):
        return wanted
    largest = max(nodes.engines, default=0)
    if not (nodes.apart or wanted.colocate):
        largest = min(largest, sum(nodes.trainer) // 2)
    size = wanted.engine_size
    while size > largest and size > 1:
        size = _smaller(size)
    hosts = sum(places >= size for places in nodes.engines)
    most = min(hosts, wanted.engines or hosts)
    for engines in range(most, 0, -1):
        found = _filled(replace(wanted, engines=engines, engine_size=size), nodes)
        if found is not None:
            return found
    if most:
        found = _shrunk(replace(wanted, engines=1, engine_size=size), nodes)
        if found is not None:
            return found
    raise ValueError(
        f"{nodes}: a trainer and an engine{' apart' * (not wanted.colocate)} do not fit"
        + (": --colocate puts both on one" if nodes.on_gpus and not wanted.colocate else "")
    )


def _fits(wanted: Wanted, nodes: Nodes) -> bool:
    engines = sum(places // wanted.engine_size for places in nodes.engines)
    assert wanted.engines is not None and wanted.ranks is not None
    return wanted.engines <= engines and wanted.ranks <= _room(wanted, nodes)


def _room(wanted: Wanted, nodes: Nodes) -> int:
    """Trainer ranks that fit beside the engines. A colocated engine needs a core, but no GPU of its own."""
    there = sum(nodes.trainer)
    if nodes.apart or (wanted.colocate and nodes.on_gpus):
        return there
    assert wanted.engines is not None
    return there - wanted.engines * (1 if wanted.colocate else wanted.engine_size)


def _filled(wanted: Wanted, nodes: Nodes) -> Wanted | None:
    """`wanted` with its number of ranks, or as many as fit; None if not one copy of the model fits.

    Colocated engines use the GPUs of ranks.
    """
    room = _room(wanted, nodes)
    ranks = min(room, wanted.ranks or room) // wanted.unit * wanted.unit
    least = (wanted.engines or 0) * wanted.engine_size if wanted.colocate else 1
    return replace(wanted, ranks=ranks) if ranks >= max(least, wanted.unit) else None


def _shrunk(wanted: Wanted, nodes: Nodes) -> Wanted | None:
    while True:
        if (found := _filled(wanted, nodes)) is not None:
            return found
        larger = [name for name in SHRINKING if getattr(wanted, name) > 1]
        if larger:
            wanted = replace(wanted, **{larger[0]: _smaller(getattr(wanted, larger[0]))})
            wanted = replace(wanted, vpp=wanted.vpp if wanted.pp > 1 else 1)
        elif wanted.colocate and wanted.engine_size > 1:
            wanted = replace(wanted, engine_size=_smaller(wanted.engine_size))
        else:
            return None


def _smaller(size: int) -> int:
    """The largest proper divisor."""
    return next(size // divisor for divisor in range(2, size + 1) if size % divisor == 0)


def nodes_of(resources: Sequence[Mapping[str, float]], trainer_role: str, engine_role: str) -> Nodes:
    """Nodes from Ray's resources of each live node. The roles are resources that some nodes have."""
    on_gpus = any(node.get("GPU", 0) for node in resources)

    def places(of: Sequence[Mapping[str, float]]) -> tuple[int, ...]:
        return tuple(int(node.get("GPU" if on_gpus else "CPU", 0)) for node in of)

    trainer = [node for node in resources if trainer_role in node]
    engines = [node for node in resources if engine_role in node]
    if trainer or engines:
        return Nodes(places(trainer), places(engines), on_gpus, apart=True)
    return Nodes(places(resources), places(resources), on_gpus)
