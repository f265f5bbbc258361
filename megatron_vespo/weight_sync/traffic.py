"""What one exact sync with all engines moves: bytes by rank and link. Pure, and fast for 1,024 ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_vespo.models.part import ModelPart
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.plan import Totals
from megatron_vespo.weight_sync.teams import Team, teams_of
from megatron_vespo.weight_sync.trainer_layout import TrainerShard

Link = Literal["memory", "host", "network"]
LINKS: tuple[Link, ...] = ("memory", "host", "network")


def link(source: Place, target: Place) -> Link:
    """`memory`: the target reads the source's own. `host`: another memory of the same host."""
    if source == target:
        return "memory"
    return "host" if source.host == target.host else "network"


@dataclass(frozen=True)
class TeamTraffic:
    """`totals` are of each engine of the team; its trainer ranks are positions in `team.sources`."""

    team: Team
    totals: Totals

    def flows(self, engines: Sequence[Sequence[Place]]) -> Iterator[tuple[int, tuple[int, int], Link, int]]:
        """Trainer rank, engine and its rank, link, bytes."""
        for (position, rank), flow in self.totals.flows.items():
            source = self.team.sources[position]
            for engine in self.team.engines:
                yield source.rank, (engine, rank), link(source.place, engines[engine][rank]), flow.bytes


@dataclass(frozen=True)
class Traffic:
    """`engines` are the places of each engine's ranks."""

    teams: list[TeamTraffic]
    engines: Sequence[Sequence[Place]]

    @cached_property
    def sent(self) -> dict[Link, dict[int, int]]:
        """Bytes by link and trainer rank, to all engines."""
        found: dict[Link, dict[int, int]] = {link: defaultdict(int) for link in LINKS}
        for rank, _, over, size in self._flows():
            found[over][rank] += size
        return found

    @cached_property
    def received(self) -> dict[Link, dict[tuple[int, int], int]]:
        """Bytes by link and (engine, its rank)."""
        found: dict[Link, dict[tuple[int, int], int]] = {link: defaultdict(int) for link in LINKS}
        for _, receiver, over, size in self._flows():
            found[over][receiver] += size
        return found

    @cached_property
    def packed(self) -> dict[int, int]:
        """Bytes that each trainer rank copies into its buffer: once for all engines of a team."""
        found: dict[int, int] = defaultdict(int)
        for part in self.teams:
            for (position, _), flow in part.totals.flows.items():
                found[part.team.sources[position].rank] += flow.bytes
        return found

    @property
    def calls(self) -> int:
        """To each engine; all of them go through the same number of groups."""
        return max(part.totals.num_groups for part in self.teams)

    def _flows(self) -> Iterator[tuple[int, tuple[int, int], Link, int]]:
        for part in self.teams:
            yield from part.flows(self.engines)


def traffic(
    shards: Sequence[TrainerShard],
    engines: Sequence[Sequence[Place]],
    count: Callable[[Sequence[TrainerShard]], Totals],
) -> Traffic:
    """`count` gives the totals of one engine's plan from these shards. It is asked once for teams alike."""
    known: dict[tuple[ModelPart, ...], Totals] = {}
    found = []
    for team in teams_of(shards, engines):
        if team.parts not in known:
            known[team.parts] = count(team.numbered)
        found.append(TeamTraffic(team, known[team.parts]))
    return Traffic(found, engines)
