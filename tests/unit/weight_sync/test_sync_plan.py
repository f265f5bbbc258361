"""Every element of an engine is written exactly once, with the right value, whatever both layouts are."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vespo.models.family import FAMILIES
from megatron_vespo.models.table import Family, ModelShape
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.plan import Plan, make_plan
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from tests.support.sync_layouts import engine_weights, held_by, model_shape, shape_for, trainer, weights

ELEMENT = 8


def run(plan: Plan, family: Family, shape: ModelShape, shards: list[TrainerShard], hf: dict[str, Tensor]):
    """What the engine's ranks have afterwards, and how often every element was written."""
    held = {shard.rank: held_by(shard.part, family, shape, hf) for shard in shards}
    values = [{name: torch.full(size, -1) for name, size in of_rank.items()} for of_rank in plan.matrices]
    writes = [{name: torch.zeros_like(tensor) for name, tensor in of_rank.items()} for of_rank in values]
    for piece in plan.pieces:
        tensor = held[piece.source][piece.tensor]
        source = tensor.view(len(tensor), -1)[
            piece.row : piece.row + piece.rows, piece.col : piece.col + piece.cols
        ]
        target = (
            slice(piece.to_row, piece.to_row + piece.rows),
            slice(piece.to_col, piece.to_col + piece.cols),
        )
        assert source.shape == (piece.rows, piece.cols)
        values[piece.engine_rank][piece.parameter][target] = source
        writes[piece.engine_rank][piece.parameter][target] += 1
    for fill in plan.padding:
        rows = slice(fill.to_row, fill.to_row + fill.rows)
        values[fill.engine_rank][fill.parameter][rows] = 0
        writes[fill.engine_rank][fill.parameter][rows] += 1
    return values, writes


@settings(max_examples=80, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2, 4]), vpp=st.sampled_from([1, 2]),
    ep=st.sampled_from([1, 2, 4]), etp=st.sampled_from([1, 2]), replicas=st.integers(1, 3),
    engine=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]),
    groups=st.sampled_from([1, 2, 4]), tied=st.booleans(), buffer=st.sampled_from([100, 1000, 10**6]),
)  # fmt: skip
def test_every_element_arrives_once(family, tp, pp, vpp, ep, etp, replicas, engine, groups, tied, buffer):
    family = FAMILIES[family]
    shape = shape_for(family, max(groups, tp), tied)
    experts = shape.num_experts
    shards = trainer(
        shape, tp, pp, 1 if pp == 4 else vpp, ep if experts else 1, etp if experts else 1, replicas
    )
    hf = weights(family, shape)
    layout = EngineLayout(engine[0], engine[1] if experts else 1)
    plan = make_plan(family, shape, shards, layout, ELEMENT, buffer)
    values, writes = run(plan, family, shape, shards, hf)
    for rank in range(layout.tp):
        expected = engine_weights(hf, shape, rank, layout.tp, layout.ep)
        assert values[rank].keys() == expected.keys()
        for name, tensor in expected.items():
            assert (writes[rank][name] == 1).all(), name
            assert values[rank][name].equal(tensor.view(len(tensor), -1)), name
    check_buffers(plan, buffer)


def check_buffers(plan: Plan, limit: int) -> None:
    """In a group no two pieces of one source share a byte, and none is behind the end."""
    by_buffer: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for piece in plan.pieces:
        span = (piece.offset, piece.offset + piece.elements * ELEMENT)
        by_buffer.setdefault((piece.source, piece.group), []).append(span)
    for spans in by_buffer.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
        assert spans[-1][1] <= plan.buffer_bytes <= limit


def test_replicas_share_the_work():
    """Of eight ranks that hold the same, none sends more than another by more than one tensor's bytes."""
    family = FAMILIES["Qwen3MoeForCausalLM"]
    shape = model_shape()
    plan = make_plan(family, shape, trainer(shape, replicas=8), EngineLayout(2), ELEMENT, 10**6)
    sent = Counter()
    for piece in plan.pieces:
        sent[piece.source] += piece.elements
    assert len(sent) == 8 and max(sent.values()) - min(sent.values()) <= 72 * 6
    assert sum(sent.values()) + sum(f.rows * f.cols for f in plan.padding) == sum(
        math.prod(matrix) for of_rank in plan.matrices for matrix in of_rank.values()
    )


@pytest.mark.parametrize(
    ("shards", "layout", "words"),
    [
        (slice(1), EngineLayout(2), "no trainer rank has model.layers.0.mlp.experts.2"),
        (slice(None), EngineLayout(2, 3), "expert parallelism 3"),
        (slice(None), EngineLayout(3, 1), "2 key heads on 3 ranks"),
    ],
)
def test_what_cannot_be_planned(shards, layout, words):
    shape = model_shape()
    with pytest.raises(ValueError, match=words):
        make_plan(FAMILIES["Qwen3MoeForCausalLM"], shape, trainer(shape, ep=2)[shards], layout, 8, 10**6)


def test_biases_of_routers_are_not_planned_beside_smaller_weights():
    """They are float32, and a plan has one size of elements: a run broadcasts instead."""
    family = FAMILIES["Glm4MoeForCausalLM"]
    shape = shape_for(family, groups=2, tied=False)
    shards = trainer(shape)
    assert make_plan(family, shape, shards, EngineLayout(1), 4, 10**6).pieces
    with pytest.raises(ValueError, match="model.layers.1.mlp.gate.e_score_correction_bias is float32"):
        make_plan(family, shape, shards, EngineLayout(1), 2, 10**6)


def test_thirty_billion_parameters_are_planned_in_seconds():
    shape = ModelShape(
        num_layers=48, hidden_size=2048, ffn_hidden_size=768, num_experts=128, num_attention_heads=32,
        num_query_groups=4, head_dim=128, vocab_size=151936, padded_vocab_size=151936, tied_embeddings=False,
    )  # fmt: skip
    began = time.process_time()
    plan = make_plan(
        FAMILIES["Qwen3MoeForCausalLM"], shape, trainer(shape, tp=2, ep=8), EngineLayout(2), 2, 2**30
    )
    seconds = time.process_time() - began
    print(f"{len(plan.pieces)} pieces in {seconds:.1f} s")
    assert sum(piece.elements for piece in plan.pieces) >= 30_532_122_624
    assert seconds < 20
