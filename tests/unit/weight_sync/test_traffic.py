"""Totals equal what the listed plans add up to, and an engine rank gets the bytes that it holds."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.models.family import FAMILIES, family_of, shape_of
from megatron_vespo.models.table import ModelShape
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.plan import Plan, count, make_plan
from megatron_vespo.weight_sync.teams import Team, replicas_of, teams_of
from megatron_vespo.weight_sync.traffic import LINKS, link, traffic
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from tests.support.published_config import LLAMA_1B, QWEN3_8B, QWEN3_30B_A3B
from tests.support.sync_layouts import engine_weights, model_shape, shape_for, trainer, weights

ELEMENT = 8
PER_HOST = 4
MOE = "Qwen3MoeForCausalLM"
LAYOUTS = {
    "family": st.sampled_from(sorted(FAMILIES)),
    "tp": st.sampled_from([1, 2, 4]), "pp": st.sampled_from([1, 2]), "vpp": st.sampled_from([1, 2]),
    "ep": st.sampled_from([1, 2, 4]), "etp": st.sampled_from([1, 2]), "replicas": st.integers(1, 4),
    "engine": st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]), "tied": st.booleans(),
    "buffer": st.sampled_from([100, 1000, 10**6]),
}  # fmt: skip


def a_case(family, ep, etp, engine, tied, **layout) -> tuple[ModelShape, list[TrainerShard], EngineLayout]:
    shape = shape_for(FAMILIES[family], 4, tied)
    experts = shape.num_experts
    shards = trainer(shape, ep=ep if experts else 1, etp=etp if experts else 1, **layout)
    return shape, shards, EngineLayout(engine[0], engine[1] if experts else 1)


def place(gpu: int) -> Place:
    host = f"h{gpu // PER_HOST}"
    return Place(host, f"{host} {gpu % PER_HOST}")


def placed(shards: list[TrainerShard]) -> list[TrainerShard]:
    return [TrainerShard(shard.rank, place(shard.rank), shard.part) for shard in shards]


def engines_from(first: int, number: int, size: int) -> list[list[Place]]:
    """Engines on neighbouring GPUs, none across hosts."""
    return [[place(first + engine * size + rank) for rank in range(size)] for engine in range(number)]


def listed(plan: Plan) -> Counter[tuple[int, int]]:
    """Bytes by trainer rank and engine rank."""
    found: Counter[tuple[int, int]] = Counter()
    for piece in plan.pieces:
        found[piece.source, piece.engine_rank] += piece.elements * ELEMENT
    return found


@settings(max_examples=80, deadline=None)
@given(**LAYOUTS)
def test_totals_are_those_of_the_listed_plan(family, engine, buffer, **layout):
    shape, shards, engine_layout = a_case(family, engine=engine, **layout)
    arguments = FAMILIES[family], shape, shards, engine_layout, ELEMENT, buffer
    plan, totals = make_plan(*arguments), count(*arguments)
    assert {ranks: flow.bytes for ranks, flow in totals.flows.items()} == listed(plan)
    assert {ranks: flow.pieces for ranks, flow in totals.flows.items()} == Counter(
        (piece.source, piece.engine_rank) for piece in plan.pieces
    )
    assert (totals.num_groups, totals.buffer_bytes) == (plan.num_groups, plan.buffer_bytes)
    leaving: Counter[tuple[int, int]] = Counter()
    coming: Counter[tuple[int, int]] = Counter()
    for piece in plan.pieces:
        leaving[piece.group, piece.source] += piece.elements * ELEMENT
        coming[piece.group, piece.engine_rank] += piece.elements * ELEMENT
    assert (max(leaving.values()), max(coming.values())) == (totals.buffer_bytes, totals.landing_bytes)
    assert max(totals.buffer_bytes, totals.landing_bytes) <= buffer
    assert totals.in_turn_bytes == sum(
        max(size for (number, _), size in leaving.items() if number == group)
        for group in range(plan.num_groups)
    )
    assert totals.uneven >= 1


@settings(max_examples=80, deadline=None)
@given(**LAYOUTS)
def test_planned_bytes_are_what_the_engines_shards_hold(family, engine, buffer, tied, **layout):
    shape, shards, engine_layout = a_case(family, engine=engine, tied=tied, **layout)
    totals = count(FAMILIES[family], shape, shards, engine_layout, ELEMENT, buffer)
    hf = weights(FAMILIES[family], shape)
    for rank in range(engine_layout.tp):
        held = engine_weights(hf, shape, rank, engine_layout.tp, engine_layout.ep)
        received = sum(flow.bytes for (_, to), flow in totals.flows.items() if to == rank)
        zeros = sum(int((tensor == 0).sum()) for tensor in held.values())
        assert received + totals.padding.get(rank, 0) == ELEMENT * sum(t.numel() for t in held.values())
        assert totals.padding.get(rank, 0) == ELEMENT * zeros


def bytes_of_engine_rank(shape: ModelShape, layout: EngineLayout, norms: bool = True) -> int:
    """In bf16, from the formula of Qwen3's and Llama's layers. `norms`: of queries and keys."""
    tp, hidden, ffn = layout.tp, shape.hidden_size, shape.ffn_hidden_size
    key = max(shape.key_width // tp, shape.head_dim)
    layer = hidden * (2 * shape.query_width // tp + 2 * key) + 2 * hidden
    layer += 2 * shape.head_dim if norms else 0
    if shape.num_experts:
        layer += shape.num_experts * (hidden + 3 * hidden * ffn // tp)
    else:
        layer += 3 * hidden * ffn // tp
    vocabulary = -(-shape.vocab_size // 64) * 64
    rest = (1 if shape.tied_embeddings else 2) * vocabulary * hidden // tp + hidden
    return 2 * (shape.num_layers * layer + rest)


@pytest.mark.parametrize("config", [QWEN3_30B_A3B, QWEN3_8B, LLAMA_1B], ids=["MoE", "dense", "tied"])
@pytest.mark.parametrize("engine", [(1, 1), (2, 1), (8, 1), (8, 8)], ids=str)
def test_bytes_of_published_models(config, engine):
    family, shape = family_of(config), shape_of(config)
    layout = EngineLayout(engine[0], engine[1] if shape.num_experts else 1)
    shards = trainer(shape, tp=2, ep=8 if shape.num_experts else 1)
    totals = count(family, shape, shards, layout, 2, 2**29)
    expected = bytes_of_engine_rank(shape, layout, "Qwen3" in family.architecture)
    for rank in range(layout.tp):
        received = sum(flow.bytes for (_, to), flow in totals.flows.items() if to == rank)
        assert received + totals.padding.get(rank, 0) == expected


@settings(max_examples=60, deadline=None)
@given(colocate=st.booleans(), number=st.integers(1, 5), **LAYOUTS)
def test_traffic_is_that_of_every_engines_listed_plan(family, engine, buffer, colocate, number, **layout):
    shape, shards, engine_layout = a_case(family, engine=engine, **layout)
    shards, first = placed(shards), 0 if colocate else -(-len(shards) // PER_HOST) * PER_HOST
    engines = engines_from(first, number, engine_layout.tp)
    arguments = {"layout": engine_layout, "element_bytes": ELEMENT, "buffer_bytes": buffer}
    found = traffic(shards, engines, partial(count, FAMILIES[family], shape, **arguments))
    where = {shard.rank: shard.place for shard in shards}
    received = {over: Counter() for over in LINKS}
    sent = {over: Counter() for over in LINKS}
    packed: Counter[int] = Counter()
    for team in teams_of(shards, engines):
        plan = make_plan(FAMILIES[family], shape, team.sources, **arguments)
        for (source, rank), size in listed(plan).items():
            packed[source] += size
            for engine_number in team.engines:
                over = link(where[source], engines[engine_number][rank])
                sent[over][source] += size
                received[over][engine_number, rank] += size
    assert (found.sent, found.received, found.packed) == (sent, received, packed)
    for engine_number in range(number):
        got = sum(
            size for of_link in received.values() for (to, _), size in of_link.items() if to == engine_number
        )
        padding = found.teams[0].totals.padding
        hf = weights(FAMILIES[family], shape)
        held = [
            engine_weights(hf, shape, r, engine_layout.tp, engine_layout.ep) for r in range(engine_layout.tp)
        ]
        everything = ELEMENT * sum(tensor.numel() for of_rank in held for tensor in of_rank.values())
        assert got + sum(padding.values()) == everything  # once per engine


def test_the_same_plan_by_other_ranks():
    shape = model_shape()
    shards = trainer(shape, ep=2, replicas=3)
    arguments = EngineLayout(2), ELEMENT, 1000
    second = teams_of(placed(shards), engines_from(8, 3, 2))[1]
    assert [shard.rank for shard in second.sources] == [2, 3]
    plan = make_plan(FAMILIES[MOE], shape, second.numbered, *arguments).sent_by([2, 3])
    assert plan == make_plan(FAMILIES[MOE], shape, second.sources, *arguments)


def ranks_of(teams: list[Team]) -> list[tuple[list[int], list[int]]]:
    return [([shard.rank for shard in team.sources], list(team.engines)) for team in teams]


def test_teams():
    shape = model_shape()
    eight = placed(trainer(shape, ep=2, replicas=4))  # on two hosts of four
    assert [[shard.rank for shard in one] for one in replicas_of(eight)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # at home, from all ranks of the host
    assert ranks_of(teams_of(eight, engines_from(0, 4, 2))) == [
        ([0, 1, 2, 3], [0, 1]),
        ([4, 5, 6, 7], [2, 3]),
    ]
    # on other hosts: four replicas for two, three and eight engines
    assert ranks_of(teams_of(eight, engines_from(8, 2, 2))) == [([0, 1, 2, 3], [0]), ([4, 5, 6, 7], [1])]
    assert ranks_of(teams_of(eight, engines_from(8, 3, 2))) == [([*range(8)], [0, 1, 2])]
    assert [len(team.engines) for team in teams_of(eight, engines_from(8, 8, 2))] == [2, 2, 2, 2]
    # both kinds at once
    assert ranks_of(teams_of(eight, [*engines_from(4, 1, 2), *engines_from(8, 1, 2)])) == [
        ([4, 5, 6, 7], [0]), ([*range(8)], [1])
    ]  # fmt: skip
    # no host has the whole model: an engine joins the team that has ranks beside it
    halves = placed(trainer(shape, pp=2, ep=4, replicas=2))
    assert [[shard.rank for shard in one] for one in replicas_of(halves)] == [
        [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    ]  # fmt: skip
    teams = teams_of(halves, [*engines_from(12, 2, 2), *engines_from(0, 2, 2)])
    assert [list(team.engines) for team in teams] == [[2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("layout", "number", "engine", "senders"),
    [
        ({"tp": 2, "ep": 8, "replicas": 128}, 64, (8, 8), 16),
        ({"tp": 2, "ep": 8, "replicas": 128}, 63, (8, 1), 1024),
        ({"tp": 2, "pp": 4, "ep": 32, "replicas": 8}, 64, (8, 1), 128),
    ],
    ids=["64 engines", "63 engines", "pipeline"],
)
def test_a_thousand_ranks_are_counted_in_seconds(layout, number, engine, senders):
    shape, engine_layout = shape_of(QWEN3_30B_A3B), EngineLayout(*engine)
    shards = placed(trainer(shape, **layout))
    assert len(shards) == 1024
    arguments = {"layout": engine_layout, "element_bytes": 2, "buffer_bytes": 2**29}
    engines = engines_from(1024, number, engine[0])
    began = time.process_time()
    found = traffic(shards, engines, partial(count, FAMILIES[MOE], shape, **arguments))
    total = sum(found.sent["network"].values())
    seconds = time.process_time() - began
    print(f"{total / 1e9:,.0f} GB in {seconds:.1f} s")
    assert seconds < 20
    assert {len(part.team.sources) for part in found.teams} == {senders}
    assert total == number * engine[0] * bytes_of_engine_rank(shape, engine_layout)
    assert set(found.received["network"].values()) == {bytes_of_engine_rank(shape, engine_layout)}
