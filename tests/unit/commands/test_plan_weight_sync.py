"""Seconds of the weight sync in a plan, for Qwen3-30B-A3B."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vespo.checkpoints.fp8_report import sent_bytes
from megatron_vespo.commands.plan.places import planned_places
from megatron_vespo.commands.plan.weight_sync import (
    CALL,
    PIECE,
    Exact,
    WeightSync,
    broadcast_cost,
    weight_sync,
)
from megatron_vespo.models.family import FAMILIES, shape_of
from megatron_vespo.models.part import ModelPart
from megatron_vespo.models.stage import Stage
from megatron_vespo.system.hardware import GLOO, GPUS, LINK_SHARE
from megatron_vespo.weight_sync.places import Place
from tests.support.published_config import QWEN3_30B_A3B
from tests.support.settings import flat_settings

LAYERS, HIDDEN, WIDTH, EXPERTS, FFN = 48, 2048, 128, 128, 768
PARAMETERS = 30_532_122_624


TENSORS = FAMILIES["Qwen3MoeForCausalLM"].hf_tensors(shape_of(QWEN3_30B_A3B))


def model(**changes) -> Any:
    plain = {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1, "trainer_ranks": 16, "bf16": True,
        "rollout_engines": 8, "sglang_flags": ["--tp-size", "1"], "colocate": False,
        "weight_sync_bucket_mb": 512, "weight_sync_staging": False, "rollout_quantization": None,
    }  # fmt: skip
    return flat_settings(**(plain | changes))


def test_broadcast():
    def cost_of(stages, nodes=1, gpus=8, **changes):
        return broadcast_cost(model(**changes), stages, TENSORS, GPUS["h100"], nodes, gpus)

    sync = cost_of([PARAMETERS // 2, PARAMETERS // 2], nodes=4)
    assert (sync.bytes, sync.link, sync.tensors) == (2 * PARAMETERS, "network", 18_867)
    assert sync.buckets == 2 * -(-PARAMETERS // 2**29)
    # gathered inside nodes; across them where the experts of 8 ranks lie on nodes of 4
    assert sync.transfer == pytest.approx(2 * PARAMETERS * (1 / 450e9 + 1 / 50e9) / LINK_SHARE)
    across = cost_of([PARAMETERS], nodes=4, gpus=4)
    assert across.transfer == pytest.approx(2 * 2 * PARAMETERS / 50e9 / LINK_SHARE)
    # 61 GB on 4 nodes: about 7 s, most of it outside the network
    assert sync.loading == pytest.approx(18_867 * 2e-4 + 114 * 0.01 + 0.4) and 6 < sync.seconds < 8
    assert cost_of([PARAMETERS]).link == "NVLink"
    # a binomial tree over the sender and eight receivers has four hops
    fp8 = cost_of([PARAMETERS], rollout_quantization="fp8")
    assert fp8.gathered_bytes == 2 * PARAMETERS and fp8.bytes == pytest.approx(sent_bytes(TENSORS, 2))
    assert fp8.tensors == 18_867 + 18_624 and fp8.buckets == -(-fp8.bytes // 2**29)
    shared = cost_of([PARAMETERS], colocate=True)
    assert shared.transfer == pytest.approx(2 * PARAMETERS * (1 / 450e9 / LINK_SHARE + 4 / GLOO))


def synced(nodes: int, size: int, expert: int = 1, flags: tuple[str, ...] = (), **changes) -> WeightSync:
    """Trained with TP 2 and EP 8 on 16 ranks; engines have `size` ranks, for experts `expert`."""
    settings = model(sglang_flags=[*flags, "--tp-size", str(size), "--ep-size", str(expert)], **changes)
    number = settings.trainer.pipeline_model_parallel_size
    stages = []
    for index in range(number):
        layers = frozenset(range(LAYERS // number * index, LAYERS // number * (index + 1)))
        part = ModelPart(layers, index == 0, index == number - 1, range(EXPERTS // 8), (0, 2), (0, 1))
        stages.append(Stage(part, 0, 0, PARAMETERS // number, 1, 1))
    family, shape = FAMILIES["Qwen3MoeForCausalLM"], shape_of(QWEN3_30B_A3B)
    return weight_sync(settings, stages, family, shape, GPUS["h100"], nodes, 8)


def exactly(*arguments, **changes) -> Exact:
    sync = synced(*arguments, **changes)
    assert sync.exact is not None and sync.why_broadcast is None and sync.seconds == sync.exact.seconds
    return sync.exact


def test_exact_sync_apart():
    """Two hosts train, two generate: engines of two ranks get half of the model, and the routers twice."""
    sync = exactly(4, 2)
    shard = 2 * (PARAMETERS + LAYERS * (EXPERTS * HIDDEN + 2 * HIDDEN + 2 * WIDTH) + HIDDEN) // 2
    assert set(sync.received.values()) == {shard} and len(sync.received) == 16
    assert sync.links == ["network"] and sum(sync.sent.values()) == 16 * shard
    assert max(sync.sent.values()) < 1.05 * shard
    # each host of the trainer serves four engines: a rank packs an eighth of what they get, once
    assert sum(sync.traffic.packed.values()) == 2 * 2 * shard
    assert sync.traffic.calls == -(-shard // 2**29) + 1
    assert shard / 40e9 < sync.seconds_over("network") < 1.3 * shard / 40e9
    assert sync.loading == pytest.approx(
        2 * shard / (0.5 * 3.35e12) + sync.traffic.calls * CALL + 18_964 * PIECE, rel=0.01
    )
    assert 1 < sync.seconds < 2 < synced(4, 2).broadcast.seconds


def test_staged_weights_are_loaded_in_one_call():
    staged, plain = exactly(4, 2, weight_sync_staging=True), exactly(4, 2)
    assert (plain.ring, staged.ring) == (2, staged.traffic.calls)
    assert plain.loading - staged.loading == pytest.approx((plain.traffic.calls - 1) * CALL)
    assert staged.seconds == staged.sending + staged.loading + staged.around


def test_exact_sync_of_colocated_engines():
    """Inside nodes, of which each has the model. Where it is the same GPU, nothing travels."""
    sync = exactly(2, 2, colocate=True)
    assert sync.links == ["host"] and sum(sync.traffic.received["memory"].values()) > 0
    assert 0.5 < sync.seconds < 2
    # engines with the trainer's own experts: only the rest of the layers crosses GPUs
    alike = exactly(2, 8, 8, colocate=True, rollout_engines=2)
    experts = 2 * LAYERS * EXPERTS // 8 * 3 * HIDDEN * FFN
    assert all(size >= experts for size in alike.traffic.received["memory"].values())
    assert max(alike.traffic.received["host"].values()) < 0.1 * experts
    # a pipeline that spans nodes sends over the network
    across = exactly(2, 2, colocate=True, pipeline_model_parallel_size=2)
    assert across.links == ["host", "network"]


def test_what_is_broadcast():
    """By the run's own rule: flags of the engines, and what the planner does not know."""
    flagged = synced(4, 2, flags=("--quantization", "fp8"))
    assert flagged.exact is None and flagged.seconds == flagged.broadcast.seconds
    assert flagged.why_broadcast == "--sglang-quantization changes how SGLang stores weights"
    unknown = synced(4, 6, rollout_engines=2)
    assert unknown.exact is None and unknown.why_broadcast == "4 key heads on 6 ranks"


def test_places_are_those_of_the_run():
    trainer, engines = planned_places(model(), 2, 4, 8)
    assert trainer == [Place(f"node {rank // 8}", f"node {rank // 8} GPU {rank % 8}") for rank in range(16)]
    assert [engine[0].host for engine in engines] == ["node 2"] * 4 + ["node 3"] * 4
    assert engines[1] == [Place("node 2", "node 2 GPU 2"), Place("node 2", "node 2 GPU 3")]
    trainer, engines = planned_places(model(colocate=True), 2, 2, 8)
    assert [place for engine in engines for place in engine] == trainer
    with pytest.raises(ValueError, match="find no place"):
        planned_places(model(), 2, 1, 8)
