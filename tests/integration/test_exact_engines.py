"""Real engines of several ranks get exactly the weights that they would have loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vespo.weight_sync.broadcast import Broadcast
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact import Exact
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.verify import check_against_checkpoint, weight_sums
from megatron_vespo.weight_sync.weight_link import WeightLink, Weights
from tests.support.servers import HOST, make_tiny_glm, make_tiny_model, tiny_engine
from tests.support.whole_model import exact_source, held_weights, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TIMEOUT_S = 60.0
BUFFER_BYTES = 300_000


@pytest.fixture(autouse=True)
def trainer_of_one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def synced(model: Path, policy: Path, folder: Path, layout: EngineLayout, place: Place | None = None):
    """An engine of `model` after a sync of `policy`; returns why weights were broadcast.

    Its checksums have been compared with those after it has loaded `policy` itself.
    """
    flags = ["--tp-size", str(layout.tp), "--ep-size", str(layout.ep)]
    engine = tiny_engine(model, folder / "engine.log", *flags)
    engine.start()
    try:
        link = WeightLink(
            rank=0,
            broadcast=Broadcast(0, 1, True, engine_size=layout.tp, host=HOST, backend="gloo"),
            exact=Exact(exact_source(policy, HOST, layout, BUFFER_BYTES, place)),
            timeout_s=TIMEOUT_S,
            pause=None,
        )
        link.connect([engine.url], [engine.url], 1)
        link.sync(Weights(lambda: [tensors_of(policy)], lambda: held_weights(policy)), 1)
        [sums] = weight_sums(link.admin)
        check_against_checkpoint(link.admin, sums, policy, 1, TIMEOUT_S)
        link.close()
        return link.why_broadcast
    finally:
        engine.stop(timeout_s=0)


@pytest.mark.parametrize("place", [None, Place("elsewhere", "elsewhere")], ids=["memory", "messages"])
@pytest.mark.parametrize("layout", [EngineLayout(2), EngineLayout(2, 2)], ids=str)
def test_an_engine_of_two_ranks(tmp_path, layout, place):
    model, policy = (
        make_tiny_model(tmp_path / f"{seed}", seed, moe_intermediate_size=128) for seed in (1, 2)
    )
    assert synced(model, policy, tmp_path, layout, place) is None


@pytest.mark.parametrize("layout", [EngineLayout(2), EngineLayout(2, 2)], ids=str)
def test_a_model_with_shared_experts_and_routers_biases(tmp_path, layout):
    model, policy = (make_tiny_glm(tmp_path / f"{seed}", seed, moe_intermediate_size=128) for seed in (1, 2))
    assert synced(model, policy, tmp_path, layout) is None


def test_such_a_model_through_a_broadcast(tmp_path):
    """The plan does not know experts that SGLang pads; shared experts and biases arrive by name."""
    model, policy = (make_tiny_glm(tmp_path / f"{seed}", seed) for seed in (1, 2))
    reason = synced(model, policy, tmp_path, EngineLayout(2))
    assert reason is not None and "w13_weight has shape" in reason


def test_experts_that_sglang_pads_are_broadcast(tmp_path):
    """On CPUs SGLang pads rows of experts whose share is no multiple of 32; the plan does not know that."""
    model, policy = (make_tiny_model(tmp_path / f"{seed}", seed) for seed in (1, 2))
    reason = synced(model, policy, tmp_path, EngineLayout(2))
    assert reason is not None and "w13_weight has shape" in reason
