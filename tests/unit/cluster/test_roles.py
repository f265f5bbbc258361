"""Which bundle goes to which node, where the trainer's nodes and the engines' are told apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vespo.cluster.roles import ROLES, SHARE, by_role, for_trainer, shortage

TRAINER, ENGINE = ROLES.values()
RANK, SGLANG = {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 2}


def node(role: str | None, gpus: int) -> dict:
    return {"CPU": 16.0, "GPU": gpus} | ({role: 1.0} if role else {})


def test_everybody_goes_to_nodes_of_the_own_role():
    asked = by_role([RANK, RANK, SGLANG], 2, {"CPU": 48, TRAINER: 1, ENGINE: 2})
    assert asked == [RANK | {TRAINER: SHARE}, RANK | {TRAINER: SHARE}, SGLANG | {ENGINE: SHARE}]
    assert RANK == {"CPU": 1, "GPU": 1}


def test_a_cluster_without_roles_is_one_for_all():
    bundles = [RANK, SGLANG]
    assert by_role(bundles, 1, {"CPU": 48, "GPU": 8}) == bundles
    assert by_role(bundles, 1, {"CPU": 48}, shared=True) == bundles
    assert shortage(bundles, [node(None, 1)]) == ""


def test_with_nodes_of_one_role_the_other_finds_none():
    assert by_role([RANK, SGLANG], 1, {"CPU": 16, TRAINER: 1})[1] == SGLANG | {ENGINE: SHARE}


def test_engines_on_the_trainers_gpus_have_no_nodes_of_their_own():
    with pytest.raises(ValueError, match=f"--colocate puts .* nodes for either \\({TRAINER}, {ENGINE}\\)"):
        by_role([RANK], 1, {"CPU": 16, TRAINER: 1, ENGINE: 1}, shared=True)


def test_whose_nodes_are_too_few():
    bundles = by_role([RANK] * 8 + [SGLANG] * 3, 8, {TRAINER: 1, ENGINE: 1})
    nodes = [node(TRAINER, 8), node(ENGINE, 4), node(None, 8)]
    assert for_trainer(nodes) == nodes[:1] and for_trainer(nodes[2:]) == nodes[2:]
    assert shortage(bundles, nodes) == (
        "; engines ask for {'CPU': 3, 'GPU': 6}, the nodes with vespo_engine (1) have {'CPU': 16.0, 'GPU': 4}"
    )


def test_pieces_that_do_not_fit():
    """An engine of 2 GPUs on nodes of one: in sum there is enough."""
    bundles = by_role([RANK, SGLANG], 1, {TRAINER: 1, ENGINE: 1})
    told = shortage(bundles, [node(TRAINER, 1), node(ENGINE, 1), node(ENGINE, 1)])
    assert re.findall(r"; (trainer ranks|engines) ask", told) == ["trainer ranks", "engines"]


def test_the_job_scripts_say_the_same_names():
    script = (Path(__file__).parents[3] / "slurm/ray_node.sh").read_text()
    assert re.findall(r'--resources=\{"(\w+)":1\}', script) == [TRAINER, ENGINE]
