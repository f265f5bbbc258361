"""Which trainer ranks serve which engines.

A replica is a smallest set of trainer ranks that holds the whole model. Engines on a host that has replicas
get their weights from all of these. All other engines, and all replicas of the trainer, are divided into as
many equal teams as possible: so every replica sends the same, and has to do with few engines.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_vespo.models.part import ModelPart
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.trainer_layout import TrainerShard

Replica = tuple[TrainerShard, ...]


@dataclass(frozen=True)
class Team:
    """Every engine of a team gets its weights from all of `sources`, by the same plan."""

    sources: Replica
    engines: tuple[int, ...]

    @property
    def parts(self) -> tuple[ModelPart, ...]:
        """Teams with the same parts have the same plan, but for the numbers of the ranks."""
        return tuple(shard.part for shard in self.sources)

    @property
    def numbered(self) -> Replica:
        """The sources with ranks 0, 1, ..."""
        return tuple(replace(shard, rank=number) for number, shard in enumerate(self.sources))


def teams_of(shards: Sequence[TrainerShard], engines: Sequence[Sequence[Place]]) -> list[Team]:
    """`engines` are the places of each engine's ranks, which are all on one host."""
    replicas = replicas_of(shards)
    at_home: dict[str, list[Replica]] = defaultdict(list)
    for replica in replicas:
        hosts = {shard.place.host for shard in replica}
        if len(hosts) == 1:
            at_home[hosts.pop()].append(replica)
    served: dict[str, list[int]] = defaultdict(list)
    others = []
    for number, places in enumerate(engines):
        host = places[0].host
        (served[host] if host in at_home else others).append(number)
    teams = [Team(_together(at_home[host]), tuple(numbers)) for host, numbers in served.items()]
    return teams + _divided(replicas, {number: engines[number] for number in others})


def replicas_of(shards: Sequence[TrainerShard]) -> list[Replica]:
    """Of the ranks with the same part each replica has one.

    Example: parts a, b, a, b of ranks 0 to 3 -> ranks (0, 1), (2, 3)
    """
    same: dict[ModelPart, list[TrainerShard]] = defaultdict(list)
    for shard in shards:
        same[shard.part].append(shard)
    return [_together([replica]) for replica in zip(*same.values(), strict=True)]


def _together(replicas: Sequence[Replica]) -> Replica:
    """The shards of all of them, by rank."""
    return tuple(sorted((shard for one in replicas for shard in one), key=lambda shard: shard.rank))


def _divided(replicas: Sequence[Replica], engines: dict[int, Sequence[Place]]) -> list[Team]:
    """Equal teams; each engine joins the nearest one that has room."""
    number = math.gcd(len(replicas), len(engines))
    each, room = len(replicas) // number, len(engines) // number
    sources = [_together(replicas[start : start + each]) for start in range(0, len(replicas), each)]
    hosts = [Counter(shard.place.host for shard in shards) for shards in sources]
    members: list[list[int]] = [[] for _ in sources]
    for engine, places in engines.items():
        open_teams = [team for team in range(number) if len(members[team]) < room]
        members[max(open_teams, key=lambda team: hosts[team][places[0].host])].append(engine)
    return [Team(shards, tuple(found)) for shards, found in zip(sources, members, strict=True) if found]
