"""Roles of nodes: in a Ray cluster that defines them, trainer ranks and engines go to different nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

# The resource that marks a node's role, from `ray start --resources`. slurm/ray_node.sh has the same names.
ROLES = {"trainer ranks": "vespo_trainer", "engines": "vespo_engine"}
SHARE = 0.001  # of the resource per bundle, so that one unit of it is enough for any node

Bundle = dict[str, float]
Resources = Mapping[str, float]  # that a node has or a bundle needs, by Ray's names


def by_role(
    bundles: Sequence[Bundle], of_trainer: int, cluster: Collection[str], shared: bool = False
) -> list[Bundle]:
    """Binds the first `of_trainer` of `bundles` to the trainer's nodes, and the others to the engines' nodes.

    `cluster` are the names of Ray's resources. If no node has a role, the bundles do not change. `shared`:
    bundles are for both.

    Example: [{"CPU": 1}, {"CPU": 1}], 1, {"CPU", "vespo_trainer", "vespo_engine"}
    -> [{"CPU": 1, "vespo_trainer": 0.001}, {"CPU": 1, "vespo_engine": 0.001}]
    """
    trainer, engine = ROLES.values()
    if trainer not in cluster and engine not in cluster:
        return list(bundles)
    if shared:
        raise ValueError(
            "--colocate puts engines on the trainer's GPUs, this Ray cluster has nodes for either "
            f"({trainer}, {engine}): leave one of the two out"
        )
    return [bundle | {trainer if i < of_trainer else engine: SHARE} for i, bundle in enumerate(bundles)]


def for_trainer(nodes: Sequence[Resources]) -> list[Resources]:
    """The nodes that may hold trainer ranks; all nodes if none has a role."""
    if not any(role in node for node in nodes for role in ROLES.values()):
        return list(nodes)
    return [node for node in nodes if ROLES["trainer ranks"] in node]


def shortage(bundles: Sequence[Resources], nodes: Sequence[Resources]) -> str:
    """The end of a message: what the bundles need of a role's nodes, and what these have; "" without roles.

    It names the roles whose nodes have too little, or both if the totals suffice but the bundles do not fit.
    """
    told, short = [], []
    for who, role in ROLES.items():
        mine = [bundle for bundle in bundles if role in bundle]
        if not mine:
            continue
        theirs = [node for node in nodes if role in node]
        asked, have = _total(mine), _total(theirs)
        line = f"{who} ask for {asked}, the nodes with {role} ({len(theirs)}) have {have}"
        told.append(line)
        if any(have[name] < asked[name] for name in asked):
            short.append(line)
    return "".join(f"; {line}" for line in short or told)


def _total(resources: Sequence[Resources]) -> dict[str, float]:
    return {name: sum(one.get(name, 0) for one in resources) for name in ("CPU", "GPU")}
