"""Weights broadcast into a running server: arrive whole, are labelled, and failures are said."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_vespo.rollout.engine_client import HttpEngineClient
from megatron_vespo.types import Completion, Prompt, SamplingParams
from megatron_vespo.weight_sync import verify
from megatron_vespo.weight_sync.bucket_sender import BucketSender
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, WeightSyncError
from tests.support.references import completion_log_probs, transformers_model
from tests.support.send_weights import send_weights
from tests.support.servers import HOST, ROUTES, START_TIMEOUT_S, make_tiny_model

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=24, stop_token_ids=())


def generate(url: str, prompt: Prompt) -> Completion:
    async def one() -> Completion:
        async with aiohttp.ClientSession() as session:
            return await HttpEngineClient(url, session, ROUTES).generate(prompt, SAMPLING, seed=None)

    return asyncio.run(one())


@pytest.fixture(scope="module")
def sender(own_engine):
    admin = EngineAdmin([own_engine.url], timeout_s=START_TIMEOUT_S)
    return BucketSender(admin, engine_size=1, name="stage_0", host=HOST, backend="gloo")


def changed_checkpoint(model: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy of a checkpoint, after `change` of its tensors."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_one_changed_element_of_one_engine_is_found_and_named(engine, own_engine, tiny_model, tmp_path):
    """`engine` is only asked for its checksums."""
    both = EngineAdmin([engine.url, own_engine.url], START_TIMEOUT_S)
    sums, same = verify.check_engines_agree(both, 0)
    assert sums == same
    assert {"lm_head.weight", "model.layers.1.mlp.experts.w2_weight"} <= sums.keys()

    def change(tensors: dict) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1e-6

    changed = changed_checkpoint(tiny_model, tmp_path / "changed", change)
    own = EngineAdmin([own_engine.url], START_TIMEOUT_S)
    own.call("/update_weights_from_disk", {"model_path": str(changed)})
    with pytest.raises(WeightSyncError) as error:
        verify.check_engines_agree(both, 4)
    said = str(error.value)
    assert said.startswith(f"weights differ after the sync of version 4: engine {own_engine.url} has")
    assert "of model.layers.1.self_attn.qkv_proj.weight, engine " + engine.url in said
    assert f"(1 of {len(sums)} tensors differ)" in said
    with pytest.raises(WeightSyncError, match=f"engine {own_engine.url} .* the checkpoint {tiny_model} has"):
        verify.check_against_checkpoint(own, verify.weight_sums(own)[0], tiny_model, 0, START_TIMEOUT_S)
    assert verify.check_engines_agree(both, 0) == [sums, sums], "loading has brought every tensor"


def test_a_tensor_that_an_update_leaves_out_is_found(own_engine, sender, tiny_model, tmp_path):
    [sums] = verify.forget_weights(sender.admin)
    weights = load_file(tiny_model / "model.safetensors")
    forgotten = weights.pop("model.layers.0.mlp.experts.5.up_proj.weight")
    sender.admin.begin()
    sender.send(weights, 0)
    sender.admin.finish(0)
    [served] = verify.weight_sums(sender.admin)
    with pytest.raises(WeightSyncError, match="of model.layers.0.mlp.experts.w13_weight.*1 of"):
        verify.compare_sums(own_engine.url, served, "the checkpoint", sums, 0)
    sender.admin.begin()
    sender.send(weights | {"model.layers.0.mlp.experts.5.up_proj.weight": forgotten}, 0)
    sender.admin.finish(0)
    assert verify.weight_sums(sender.admin) == [sums]
    verify.check_against_checkpoint(sender.admin, sums, tiny_model, 0, START_TIMEOUT_S)


def test_the_engine_serves_the_new_weights(own_engine, sender, prompts, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    send_weights(sender, other, 7)
    model = transformers_model(other)
    for prompt in prompts:
        completion = generate(own_engine.url, prompt)
        assert completion.policy_versions.are_all(7)
        difference = np.abs(completion.log_probs - completion_log_probs(model, completion)).max()
        assert difference <= 1e-4


def test_another_version_than_expected_is_an_error(sender):
    sender.admin.begin()
    with pytest.raises(WeightSyncError, match="serves weight version 7 after the sync of version 8"):
        sender.admin.finish(8)


def test_weights_outside_an_update_are_refused_in_the_engines_words(sender):
    with pytest.raises(WeightSyncError, match="begin_weight_update"):
        sender.admin.call(
            "/update_weights_from_distributed",
            {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]], "group_name": sender.name},
        )


def test_a_dead_engine_is_named(own_engine, sender):
    own_engine.stop(timeout_s=0)
    with pytest.raises(
        WeightSyncError, match=f"engine {own_engine.url}: /begin_weight_update did not answer"
    ):
        sender.admin.begin()
