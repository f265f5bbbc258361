"""Real FP8 engines: what a sync brings is what they load from a folder that `convert` has written.

Parameters, names and loading are SGLang's own; the multiplication is the stand-in of patches/cpu.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vespo.checkpoints.block_fp8 import quantised
from megatron_vespo.checkpoints.buckets import buckets
from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.rollout.fp8_engines import DTYPE, fp8_arguments
from megatron_vespo.rollout.sglang_server import SGLangServer
from megatron_vespo.system.http import post_json
from megatron_vespo.system.plugins import WEIGHT_LOADER
from megatron_vespo.weight_sync.broadcast import Broadcast
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from megatron_vespo.weight_sync.verify import check_against_checkpoint, weight_sums
from megatron_vespo.weight_sync.weight_link import WeightLink, Weights
from tests.support.raw_weights import LOADER, raw_sums
from tests.support.runs import finished, train_command, write_questions
from tests.support.servers import HOST, make_tiny_model, tiny_engine
from tests.support.tensors import read_tensors
from tests.support.tiny_checkpoints import convert
from tests.support.whole_model import model_of, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TIMEOUT_S = 60.0
BLOCKS: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 128}
FLAGS = ["--dtype", DTYPE, "--custom-weight-loader", WEIGHT_LOADER, LOADER]


@pytest.fixture
def trainer_of_one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    model = make_tiny_model(folder / "hf", 2, dtype="bfloat16", **BLOCKS)
    assert convert("hf-to-megatron", model, folder / "megatron") == 0
    assert convert("megatron-to-hf", folder / "megatron", folder / "fp8", "--dtype", "fp8") == 0
    return folder


def sync(engine: SGLangServer, size: int, policy: Path) -> tuple[WeightLink, int, int]:
    """Bring the policy to the engine; the bytes sent and those of the policy in bf16."""
    sent = 0

    def counted():
        nonlocal sent
        for bucket in buckets(quantised(tensors_of(policy / "hf").items()), 300_000):
            sent += sum(tensor.nbytes for tensor in bucket.values())
            yield bucket

    broadcast = Broadcast(0, 1, True, engine_size=size, host=HOST, backend="gloo")
    link = WeightLink(rank=0, broadcast=broadcast, exact="fp8", timeout_s=TIMEOUT_S, pause=None)
    link.connect([engine.url], [engine.url], 1)
    link.sync(Weights(counted, dict), 1)
    return link, sent, sum(tensor.nbytes for tensor in tensors_of(policy / "hf").values())


def fresh_engine(policy: Path, log: Path, *flags: str) -> SGLangServer:
    """An engine as a run starts it: of the unquantised folder, whose weights it does not load."""
    family, shape = model_of(policy / "hf")
    return tiny_engine(policy / "hf", log, *FLAGS, *fp8_arguments(family.hf_tensors(shape)), *flags)


def test_after_a_sync_it_is_the_engine_that_has_loaded_the_folder(policy, tmp_path, trainer_of_one_rank):
    synced = fresh_engine(policy, tmp_path / "synced.log")
    loaded = tiny_engine(policy / "fp8", tmp_path / "loaded.log", *FLAGS)
    with ThreadPoolExecutor() as threads:
        list(threads.map(SGLangServer.start, (synced, loaded)))
    try:
        link, sent, plain = sync(synced, 1, policy)
        of_loaded = EngineAdmin([loaded.url], TIMEOUT_S)
        [expected] = raw_sums(of_loaded, 1, tmp_path)
        [found] = raw_sums(link.admin, 1, tmp_path)
        assert found == expected
        assert weight_sums(link.admin) == weight_sums(of_loaded)
        kinds = {name: kind for name, (kind, _, _) in found.items()}
        quantised_names = {name for name, kind in kinds.items() if kind == "torch.float8_e4m3fn"}
        assert {name.rpartition(".layers.0.")[2] for name in quantised_names if ".layers.0." in name} == {
            "self_attn.qkv_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.experts.w13_weight",
            "mlp.experts.w2_weight",
        }
        for name in quantised_names:
            assert kinds[name + "_scale_inv"] == "torch.float32"
        assert kinds["model.layers.0.mlp.gate.weight"] == kinds["lm_head.weight"] == "torch.bfloat16"
        print(f"sent {sent:,} bytes, in bf16 {plain:,}: {sent / plain:.4f}")
        assert 0.5 < sent / plain < 0.53
        assert answer(synced) == answer(loaded)
        link.close()
    finally:
        for engine in (synced, loaded):
            engine.stop(timeout_s=0)


def answer(engine: SGLangServer) -> list:
    payload = {
        "input_ids": [10, 20, 30, 40],
        "sampling_params": {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
        "return_logprob": True,
    }
    return post_json(engine.url, "/generate", payload, TIMEOUT_S)["meta_info"]["output_token_logprobs"]


@pytest.mark.parametrize("flags", ["--tp-size 2", "--tp-size 2 --ep-size 2"])
def test_an_engine_of_two_ranks(policy, tmp_path, trainer_of_one_rank, flags):
    engine = fresh_engine(policy, tmp_path / "engine.log", *flags.split())
    engine.start()
    try:
        link, _, _ = sync(engine, 2, policy)
        found = raw_sums(link.admin, 2, tmp_path)
        [sums] = weight_sums(link.admin)
        check_against_checkpoint(link.admin, sums, policy / "fp8", 1, TIMEOUT_S)
        assert found == raw_sums(link.admin, 2, tmp_path)
        link.close()
    finally:
        engine.stop(timeout_s=0)


@pytest.mark.parametrize(
    ("layout", "way"),
    [
        ("--trainer-ranks 2 --tensor-model-parallel-size 2 --expert-model-parallel-size 2 "
         "--expert-tensor-parallel-size 1 --pipeline-model-parallel-size 1 --bf16", "auto"),
        ("", "disk"),
    ],
)  # fmt: skip
def test_a_run_compares_every_sync_with_an_export(tmp_path, layout, way):
    """--weight-check-interval 1: one engine loads the FP8 folder of every step's weights."""
    model = make_tiny_model(tmp_path / "model", 0, **BLOCKS)
    more = ["--weight-sync-folder", str(tmp_path / "files")] if way == "disk" else []
    command = train_command(
        model, write_questions(tmp_path / "q.jsonl"), tmp_path / "out", "--rollout-quantization", "fp8",
        "--weight-check-interval", "1", "--weight-sync", way, *more, *layout.split(),
        "--reward-function", "tests.support.run_rewards:first_letters",
    )  # fmt: skip
    said = finished(command, tmp_path / "run.log", 400)
    assert "--rollout-quantization fp8 quantises whole tensors" in said
    records = [record for record in read_metrics(tmp_path / "out/metrics.jsonl") if "train/loss" in record]
    assert len(records) == 3
    assert "quantization_config" not in json.loads((tmp_path / "out/hf/config.json").read_text())
    exported = read_tensors(tmp_path / "out/hf").values()
    assert {tensor.dtype for tensor in exported} == {torch.bfloat16 if layout else torch.float32}
