"""Plans against closed forms for Qwen3-30B-A3B.

Plans import Megatron, which changes the process: one child does it for all tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_vespo.commands.main import run
from megatron_vespo.commands.plan.command import parsed
from megatron_vespo.commands.plan.engine_memory import engine_memory
from megatron_vespo.commands.plan.host_memory import host_memory
from megatron_vespo.commands.plan.layer_activations import kept_by_layer
from megatron_vespo.commands.plan.packs import pack_bytes, sample_bytes
from megatron_vespo.commands.plan.plan import memory_of, model_of
from megatron_vespo.commands.plan.recomputation import margin, without_recomputation
from megatron_vespo.commands.plan.speed import model_cost
from megatron_vespo.commands.plan.trainer_memory import (
    ENGINE_AT_REST,
    RESERVE,
    Stage,
    activation_bytes,
    in_flight,
    log_prob_bytes,
    packs_in_flight_bytes,
    trainer_memory,
)
from megatron_vespo.commands.plan.weight_sync import trainer_shards
from megatron_vespo.models.part import ModelPart
from megatron_vespo.system.hardware import GPUS, ON_GPUS
from megatron_vespo.weight_sync.places import Place
from tests.support.published_config import QWEN3_30B_A3B
from tests.support.settings import flat_settings

LAYERS, HIDDEN, HEADS, GROUPS, WIDTH = 48, 2048, 32, 4, 128
EXPERTS, TOP, FFN, VOCABULARY = 128, 8, 768, 151936
PARAMETERS = 30_532_122_624
RUN = """
--prompt-data none.parquet --output-dir none --load none --bf16 --train-iters 64 --lr 1e-6  # nothing is there
--steps-per-rollout 4 --rollout-batch-size 512 --group-size 8
--max-prompt-tokens 1024 --max-completion-tokens 15360 --max-tokens-per-gpu 16384
"""
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# ranks, then tp, pp, virtual stages, cp, ep, etp
LAYOUTS = [
    (8, 1, 1, 1, 1, 8, 1),
    (16, 2, 1, 1, 2, 16, 1),
    (16, 4, 1, 1, 1, 8, 2),
    (64, 4, 2, 1, 2, 8, 1),
    (64, 2, 4, 3, 1, 4, 2),
    (1024, 2, 4, 1, 4, 32, 1),
]
ALL_OF_IT = ModelPart(frozenset(range(LAYERS)), True, True, range(EXPERTS), (0, 1), (0, 1))
PRECISE = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"


def plan_here(flags: str) -> tuple[list, list, int]:
    """Stages, their memory and the parameters that the HF checkpoint has."""
    args, stages = parsed([*ON_GPUS, *flags.split()])
    return stages, memory_of(args, stages), model_of(args)[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("Qwen3-30B-A3B")
    (folder / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    return folder


@pytest.fixture(scope="module")
def plan(child, checkpoint):
    text = RUN.replace("  # nothing is there", "")
    return lambda flags: child(plan_here, f"--hf-checkpoint {checkpoint} {text} {flags}")


def flags_of(ranks, tensor, pipeline, virtual, context, expert, expert_tensor) -> str:
    flags = (
        f"--trainer-ranks {ranks} --tensor-model-parallel-size {tensor} --context-parallel-size {context} "
        f"--pipeline-model-parallel-size {pipeline} --expert-model-parallel-size {expert} "
        f"--expert-tensor-parallel-size {expert_tensor}"
    )
    return flags + (f" --num-virtual-stages-per-pipeline-rank {virtual}" if virtual > 1 else "")


def held(stage: int, tensor: int, pipeline: int, expert: int, expert_tensor: int) -> tuple[int, int]:
    """Parameters of a rank: dense ones and those of experts, written down from the model's formula."""
    sharded = HIDDEN * (HEADS + 2 * GROUPS) * WIDTH + HEADS * WIDTH * HIDDEN
    replicated = 2 * HIDDEN + 2 * WIDTH + EXPERTS * HIDDEN  # norms of layer, queries and keys; router
    layers = LAYERS // pipeline
    dense = layers * (sharded // tensor + replicated)
    if stage == 0:
        dense += VOCABULARY * HIDDEN // tensor
    if stage == pipeline - 1:
        dense += VOCABULARY * HIDDEN // tensor + HIDDEN
    return dense, layers * EXPERTS // expert * 3 * HIDDEN * FFN // expert_tensor


@pytest.mark.long
def test_kernels_that_this_machine_lacks_change_no_plan(plan):
    """Megatron's own checks of them still count."""
    flags = flags_of(*LAYOUTS[0])
    fused = "--moe-permute-fusion --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep"
    assert plan(f"{flags} {fused}") == plan(flags)
    with pytest.raises(ValueError, match="pad_expert_input_to_capacity"):
        plan(f"{flags} {fused} --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity")


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parameters_and_bytes_of_every_stage(plan, layout):
    ranks, tensor, pipeline, virtual, context, expert, expert_tensor = layout
    stages, memory, in_checkpoint = plan(flags_of(*layout))
    assert len(stages) == pipeline
    assert sum(stage.whole for stage in stages) == in_checkpoint == PARAMETERS
    for index, (stage, bytes_) in enumerate(zip(stages, memory, strict=True)):
        dense, experts = held(index, tensor, pipeline, expert, expert_tensor)
        assert (stage.layers, stage.dense, stage.experts) == (LAYERS // pipeline, dense, experts)
        assert bytes_.weights == 2 * (dense + experts)
        assert bytes_.gradients == 4 * (dense + experts)
        data = ranks // (tensor * pipeline)  # context parallelism shards the optimizer, too
        expert_data = ranks // (expert_tensor * expert * pipeline)
        assert bytes_.optimizer == 12 * (dense / data + experts / expert_data)
        assert bytes_.host == 0


def parts_here(flags: str, ranks: list[int]) -> tuple[list, list]:
    """What these ranks hold: in Megatron's own models and groups, and by the numbers of the ranks."""
    from megatron_vespo.trainer.meta_model import stage_of_rank

    settings, stages = parsed([*ON_GPUS, *flags.split()])
    shards = trainer_shards(settings, stages, [Place("", "")] * settings.trainer.trainer_ranks)
    built = [stage_of_rank(settings.megatron, rank).part for rank in ranks]
    return built, [shards[rank].part for rank in ranks]


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_of_ranks_are_megatrons(child, checkpoint, layout):
    ranks = sorted(
        {0, 1, layout[0] // 3, layout[0] // 2 + 5, layout[0] - 3, layout[0] - 1} & {*range(layout[0])}
    )
    text = RUN.replace("  # nothing is there", "")
    built, numbered = child(parts_here, f"--hf-checkpoint {checkpoint} {text} {flags_of(*layout)}", ranks)
    assert built == numbered and len(set(built)) > 1


@pytest.mark.long
def test_flags_of_the_optimizer(plan):
    layout = flags_of(*LAYOUTS[0])
    dense, experts = held(0, 1, 1, 8, 1)
    shard = dense / 8 + experts
    of = {flags: plan(f"{layout} {flags}")[1][0] for flags in (
        "--grad-reduce-in-bf16", PRECISE, "--use-precision-aware-optimizer --optimizer-cpu-offload",
        f"{PRECISE} --main-grads-dtype bf16",
    )}  # fmt: skip
    bf16, precise, offloaded, small_gradients = of.values()
    assert bf16.gradients == 2 * (dense + experts) and bf16.optimizer == 16 * shard  # a copy in fp32
    assert precise.gradients == 4 * (dense + experts) and precise.optimizer == (2 + 2 + 2) * shard
    assert offloaded.optimizer == 0 and offloaded.host == 16 * shard
    assert small_gradients.gradients == 2 * (dense + experts) and small_gradients.optimizer == 6 * shard


def model(**changes) -> SimpleNamespace:
    plain = {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "microbatch_group_size_per_vp_stage": None,
        "expert_tensor_parallel_size": 1, "sequence_parallel": False, "distribute_saved_activations": False,
        "params_dtype": torch.bfloat16, "bf16": True, "hidden_size": HIDDEN, "num_attention_heads": HEADS,
        "num_query_groups": GROUPS, "kv_channels": WIDTH, "qk_layernorm": True, "num_experts": EXPERTS,
        "moe_router_topk": TOP, "moe_ffn_hidden_size": FFN, "ffn_hidden_size": 6144,
        "moe_shared_expert_intermediate_size": None,
        "max_tokens_per_gpu": 1000, "padded_vocab_size": VOCABULARY, "log_prob_chunk_size": 1024,
        "recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None,
        "recompute_modules": None, "global_batch_size": 1024, "data_parallel_size": 1,
        "weight_sync_bucket_mb": 512, "sglang_flags": [], "colocate": False, "colocate_offload": True,
        "expert_model_parallel_size": 8, "num_layers": LAYERS, "max_prompt_tokens": 1024,
        "max_completion_tokens": 15360, "routing_replay": None, "ratio_denominator": "recomputed",
        "rollout_quantization": None,
        "rollout_temperature": 1.0, "rollout_top_p": 1.0, "rollout_top_k": -1, "rollout_min_p": 0.0,
        "weight_sync_staging": False, "rollout_batch_size": 2048, "group_size": 8, "async_save": False,
        "old_policy": "current", "uses_reference": False, "reference_update_interval": None,
        "transformer_impl": "local", "trainer_ranks": 16, "old_policy_snapshots": 3,
        "use_precision_aware_optimizer": False, "use_distributed_optimizer": True,
        "accumulate_allreduce_grads_in_fp32": True, "steps_per_rollout": 1,
    }  # fmt: skip
    return flat_settings(**(plain | changes))


def test_what_a_layer_keeps():
    # bf16 a token: four of the hidden size; queries, keys before and after their norms, values, output
    attention = 2 * (4 * 2048 + 2 * (4096 + 512) + 512 + 4096) + 4 * 32
    experts = 2 * 8 * (2048 + 3 * 768) + 8 * 128
    assert sum(kept.bytes for kept in kept_by_layer(model().trainer)) == attention + experts
    # two ranks with sequence parallelism: a half of everything
    halves = model(tensor_model_parallel_size=2, sequence_parallel=True)
    assert sum(kept.bytes for kept in kept_by_layer(halves.trainer)) == (attention + experts) / 2
    # expert tensor parallelism gathers the tokens of both, of which the rank has half the widths
    gathered = model(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)
    assert sum(kept.bytes for kept in kept_by_layer(gathered.trainer)) == (attention + experts) / 2 + 8 * 2048
    dense = sum(kept.bytes for kept in kept_by_layer(model(num_experts=None).trainer))
    assert dense == attention + 2 * 3 * 6144


def test_recomputation():
    everything, tokens = sum(kept.bytes for kept in kept_by_layer(model().trainer)), 1000
    largest = 2 * 8 * 2 * 768 if 2 * 768 > 2048 else 2 * 8 * 2048
    assert activation_bytes(model(), 48, 0) == tokens * (48 * everything + largest)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert activation_bytes(model(**full), 48, 0) == tokens * (48 * 2 * 2048 + everything + largest)
    by_three = full | {"recompute_num_layers": 3}
    assert activation_bytes(model(**by_three), 48, 0) == tokens * (16 * 4096 + 3 * everything + largest)
    block = full | {"recompute_method": "block", "recompute_num_layers": 40}
    stored = 40 * 4096 + 8 * everything
    assert activation_bytes(model(**block), 48, 0) == tokens * (stored + everything + largest)
    freed = 2 * 8 * 768 + 2 * 2 * 2048
    selective = {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]}
    assert activation_bytes(model(**selective), 48, 0) == tokens * (
        48 * (everything - freed) + freed + largest
    )


@pytest.mark.parametrize(
    ("experts", "modules", "freed"),
    [
        # the first norm is a part of the projection behind it; that of experts stands alone
        (EXPERTS, ["layernorm"], 2 * 2048),
        (EXPERTS, ["layernorm", "moe"], 2 * 2048 + 2 * 8 * (2048 + 3 * 768) + 8 * 128),
        (None, ["layernorm"], 0),
        (None, ["mlp"], 2 * 2048 + 2 * 3 * 6144),
    ],
)
def test_norms_inside_the_linear_layers_of_transformer_engine(experts, modules, freed):
    selective = {"recompute_granularity": "selective", "recompute_modules": modules}
    args = model(transformer_impl="transformer_engine", num_experts=experts, **selective)
    kept = sum(kept.bytes for kept in kept_by_layer(args.trainer))
    largest = max(kept.bytes for kept in kept_by_layer(args.trainer))
    assert activation_bytes(args, 48, 0) == 1000 * (48 * (kept - freed) + freed + largest)


def peak(warm_up: int, total: int) -> int:
    """Forward passes that wait for their backward pass, at most, in a schedule with that warm-up."""
    waiting = most = 0
    for step in range(total):
        waiting += 1
        most = max(most, waiting)
        if step >= warm_up:
            waiting -= 1
    return most


@pytest.mark.parametrize("stages", (1, 2, 4))
def test_micro_batches_in_flight(stages):
    for batch in (2, 32):
        for stage in range(stages):
            args = model(pipeline_model_parallel_size=stages, global_batch_size=batch)
            assert in_flight(args, stage) == peak(stages - stage - 1, batch)
            if stages > 1 and batch >= stages:
                args.values.virtual_pipeline_model_parallel_size = 3
                warm_up = (stages - stage - 1) * 2 + 2 * stages
                assert in_flight(args, stage) == pytest.approx(peak(warm_up, 3 * batch) / 3)


@pytest.mark.parametrize(
    "replay, each",
    [(None, 0), ("R2", LAYERS * TOP / 2), ("R3", LAYERS * TOP)],
)
def test_packs(replay, each):
    """Those in flight on the GPU, however many there are; on the host a rollout batch of them."""
    args = model(routing_replay=replay, tensor_model_parallel_size=2, sequence_parallel=True)
    # three int64 and three float32 of every token, one more of each of one that is predicted or has pi_old
    whole = pack_bytes(args, LAYERS)
    assert whole == pytest.approx(4 * 8 + 3 * 4 + 8 + 8 * 15 / 16 + each, abs=0.5)
    in_flight_bytes = 2 * whole + (LAYERS * TOP * 8 / 2 if replay else 0)
    for steps in (1, 64):
        args.values.steps_per_rollout, args.values.rollout_batch_size = steps, 256 * steps
        assert packs_in_flight_bytes(args, LAYERS, 0) == 1000 * in_flight_bytes
        stage = Stage(ALL_OF_IT, 0, 0, 0, 1, 1)
        host = host_memory(args, [stage], [trainer_memory(args, stage, 0)], 4096, 8)
        assert host.packs == 256 * steps * 8 * 4096 * whole
        assert host.samples == pytest.approx(
            256 * (steps + 1) * 8 * 4096 * (4 + 15 / 16 * 4 + (each if replay == "R3" else 0)), rel=1e-2
        )
        assert host.node == 8 * host.packs + host.samples
    # a count and ten ids of every sampled token, or as many as top-k leaves
    for flags, ids in (({"rollout_top_p": 0.9}, 10), ({"rollout_top_k": 4}, 4)):
        of_masks = 15 / 16 * (4 + 4 * ids)
        assert pack_bytes(model(**flags), LAYERS) - pack_bytes(model(), LAYERS) == pytest.approx(
            of_masks, rel=0.01
        )
        assert sample_bytes(model(**flags)) - sample_bytes(model()) == pytest.approx(of_masks, rel=0.01)
    virtual = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    # each of two chunks has its own copy of what is in flight
    waiting = in_flight(model(**virtual), 0)
    copies = packs_in_flight_bytes(model(**virtual), LAYERS, 0) / pack_bytes(model(), LAYERS) / 1000
    assert copies == pytest.approx(2 * waiting + 1)


def test_host_memory():
    stage = Stage(ALL_OF_IT, 10**9, 0, 10**9, 1, 1)

    def host(**changes):
        args = model(**changes)
        return host_memory(args, [stage], [trainer_memory(args, stage, 0)], 4096, 8)

    assert host().rank == host().packs and host(trainer_ranks=4).ranks == 4
    assert host(colocate=True).given_back == 14e9
    assert host(colocate=True, colocate_offload=False).given_back == 0
    assert host(async_save=True).save == 14e9
    assert host(old_policy="snapshot").other_policies == 4 * 2e9
    assert host(old_policy="ewma").other_policies == 3 * 2e9
    # the policy's own copy is needed once, as only one other policy is in its place at a time
    assert host(uses_reference=True).other_policies == 2 * 2e9
    assert host(uses_reference=True, old_policy="snapshot").other_policies == 5 * 2e9
    moving = {"uses_reference": True, "reference_update_interval": 8}
    assert host(**moving).save == 0 and host(**moving, async_save=True).save == 16e9


def test_the_output_layer():
    rows, tokens = VOCABULARY // 2, 1000
    hidden = tokens * HIDDEN
    rest = 6 * 8 * tokens
    # logits in fp32, their gradient in bf16
    expected = 2 * hidden + (2 + 4) * hidden + 1024 * rows * (4 + 2) + rest + rows * HIDDEN * 2
    assert log_prob_bytes(model(tensor_model_parallel_size=2)) == expected
    # the gradient in the place of the logits
    expected = 4 * hidden + (4 + 4) * hidden + 1024 * rows * 4 + rest + rows * HIDDEN * 4
    in_fp32 = model(tensor_model_parallel_size=2, bf16=False, params_dtype=torch.float32)
    assert log_prob_bytes(in_fp32) == expected


def test_engines(checkpoint):
    shape, parameters = model_of(flat_settings(hf_checkpoint=checkpoint))
    gpu, free = GPUS["h100"], GPUS["h100"].memory - 2**30
    given = ["--mem-fraction-static", "0.8"]
    engine = engine_memory(model(sglang_flags=given), shape, 2 * parameters, gpu, 2)
    assert (engine.weights, engine.assumed) == (PARAMETERS, False)  # two bytes over two GPUs
    assert engine.token_bytes == 48 * 2 * 128 * 2 * 2  # 4 heads over two GPUs
    assert engine.cache == pytest.approx(0.8 * free - PARAMETERS)
    assert engine.tokens == int((0.8 * free - PARAMETERS) // engine.token_bytes)
    wide = engine_memory(model(sglang_flags=["--kv-cache-dtype", "fp8_e5m2"]), shape, 2 * parameters, gpu, 8)
    assert wide.token_bytes == 48 * 1 * 128 * 2 and wide.assumed  # heads are not cut
    assert engine_memory(model(), shape, 2 * parameters, GPUS["a100-40gb"], 1).tokens == 0
    cost = model_cost(shape, parameters, TOP, 2)
    assert cost.active == PARAMETERS - 48 * 120 * 3 * 2048 * 768
    assert cost.cache_bytes == 48 * 4 * 128 * 2 * 2


def command_here(words: list[str]) -> SimpleNamespace:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run(["plan", *words])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def command(child):
    """What `megatron-vespo plan` returns and prints, in the process that has Megatron."""
    return lambda recipe, *flags: child(command_here, [str(recipe), *flags])


@pytest.fixture(scope="module")
def recipe(checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "run.flags"
    layout = flags_of(16, 2, 1, 1, 1, 8, 1)
    engines = "--rollout-engines 8 --sglang-tp-size 2 --sglang-mem-fraction-static 0.8"
    path.write_text(f"--hf-checkpoint {checkpoint}\n{RUN}{layout}\n{engines}\n{FULL}\n")
    return path


@pytest.mark.long
def test_the_command(command, recipe):
    words = [sys.executable, "-m", "megatron_vespo", "plan", str(recipe), "--nodes", "4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and done.stderr == ""
    assert "30,532,122,624 parameters over all ranks" in done.stdout
    assert re.search(r"^weight sync       1\.\d s, shard to shard by NCCL", done.stdout, re.M)
    assert re.search(
        r"^  received        per engine rank, at most: 30\.5 GB over the network$", done.stdout, re.M
    )
    assert "4 nodes x 8 h100" in done.stdout and "tp2, pp1, vpp1, cp1, dp8, ep8, etp1" in done.stdout
    assert done.stdout.rstrip().endswith("fits")
    suggested = "--recompute-granularity selective --recompute-modules layernorm moe"
    [left] = re.findall(
        rf"^suggestion: {suggested} recomputes less \(headroom (.*) GiB\)$", done.stdout, re.M
    )
    path = recipe.with_name("selective.flags")
    path.write_text(recipe.read_text().replace(FULL, suggested))
    done = command(path, "--nodes", "4")
    headroom = float(re.search(r"  headroom +(.*)", done.stdout)[1])
    assert done.returncode == 0 and headroom == pytest.approx(float(left), abs=0.051)
    assert "suggestion" not in done.stdout


def test_uneven_routing_needs_a_larger_margin():
    """As much again as experts keep, unless it is computed again."""
    stage, memory = Stage(ALL_OF_IT, 0, 0, 0, 1, 1), 80e9
    experts = 2 * 8 * (2048 + 3 * 768) + 8 * 128
    selective = {"recompute_granularity": "selective"}
    assert margin(model(), [stage], memory) == 8e9 + 1000 * 48 * experts
    act = model(recompute_modules=["moe_act", "layernorm"], **selective)
    assert margin(act, [stage], memory) == 8e9 + 1000 * 48 * (experts - 2 * 8 * 768)
    assert margin(model(recompute_modules=["moe"], **selective), [stage], memory) == 8e9
    assert margin(model(num_experts=None), [stage], memory) == 8e9


def test_flags_of_recomputation_are_taken_out():
    flags = f"--a 1 {FULL} --recompute-modules moe layernorm --recompute-activations --b --c=2".split()
    assert without_recomputation(flags) == "--a 1 --recompute-activations --b --c=2".split()
    assert without_recomputation(["--recompute-method=uniform", "--x"]) == ["--x"]


@pytest.mark.long
def test_a_run_that_does_not_fit_names_flags_that_help(command, recipe):
    done = command(recipe, "--nodes", "1", "--gpu", "a100-40gb", "--trainer-ranks", "8")
    print(done.stdout, done.stderr)
    assert done.returncode == 1
    assert "DOES NOT FIT: 24 GPUs are needed, 1 node x 8 = 8 are there: --nodes 3" in done.stdout
    assert "--use-precision-aware-optimizer --optimizer-cpu-offload (headroom " in done.stdout


@pytest.mark.long
def test_one_is_said_as_one(command, recipe):
    flags = "--nodes 1 --gpus-per-node 1 --trainer-ranks 1 --tensor-model-parallel-size 1 --sglang-tp-size 1"
    done = command(recipe, *flags.split(), "--expert-model-parallel-size", "1", "--rollout-engines", "1")
    assert "cluster    1 node x 1 h100 of 79.1 GiB = 1 GPU; 1 train, 1 engine x 1 generate\n" in done.stdout
    assert "\nengine of 1 GPU, GiB a GPU, mem-fraction-static 0.8 (given)\n" in done.stdout


@pytest.mark.long
def test_gpus_that_are_shared_in_turn(plan, command, checkpoint, recipe):
    colocated = "--colocate --rollout-engines 8 --sglang-tp-size 2 --sglang-mem-fraction-static"
    layout = flags_of(16, 2, 1, 1, 1, 8, 1)
    [stage], [offloading], _ = plan(f"{layout} {colocated} 0.5 {FULL}")
    [memory] = plan(f"{layout} {colocated} 0.5 --no-colocate-offload {FULL}")[1]
    [apart] = plan(f"{layout} {FULL}")[1]
    # training: all that it has apart, and an engine at rest
    buffers = 2 * 512 * 2**20  # of what the rank sends; as much again of what others send to its GPU
    assert (apart.sync_buffers, memory.sync_buffers) == (buffers, 2 * buffers)
    assert memory.total == offloading.total == apart.total + ENGINE_AT_REST + buffers
    # generating: gradients and activations are given back, and what is offloaded
    assert memory.at_rest == memory.weights + memory.optimizer + 2 * buffers + RESERVE
    assert offloading.at_rest == 2 * buffers + RESERVE
    # in a sync the weights are there
    assert memory.in_sync - offloading.in_sync == memory.optimizer
    assert offloading.in_sync == memory.weights + RESERVE + 3 * buffers
    # for a save all but gradients comes back, for log-probs weights and activations
    forward = memory.activations + memory.log_probs + memory.packs
    assert memory.comes_back == forward
    assert offloading.comes_back == memory.weights + max(forward, memory.optimizer)
    shape, parameters = model_of(flat_settings(hf_checkpoint=checkpoint))
    given = model(sglang_flags=["--mem-fraction-static", "0.5"])
    alone, beside = (
        engine_memory(given, shape, 2 * parameters, GPUS["h100"], 2, trainer)
        for trainer in (0.0, memory.at_rest)
    )
    assert (beside.cache, beside.rest) == (alone.cache, alone.rest - memory.at_rest)

    refused = command(recipe, "--nodes", "2", *colocated.split(), "0.8", "--no-colocate-offload")
    assert refused.returncode == 1 and "GPUs are needed" not in refused.stdout
    [error] = [line for line in refused.stdout.splitlines() if "DOES NOT FIT" in line]
    fraction = re.search(r"5 are wanted: --sglang-mem-fraction-static (0\.\d+)$", error)[1]
    free = GPUS["h100"].memory - 2**30
    assert (1 - float(fraction)) * free - memory.at_rest >= 5 * 2**30  # and a hundredth more would not do
    assert (0.99 - float(fraction)) * free - memory.at_rest < 5 * 2**30
    done = command(recipe, "--nodes", "2", *colocated.split(), fraction, "--no-colocate-offload")
    print(done.stdout, done.stderr)
    assert (
        done.returncode == 0 and "16 train, 8 engines x 2 generate, in turn on the same GPUs" in done.stdout
    )
    assert "--max-staleness" not in done.stdout and "turns  " not in done.stdout
    # what is offloaded makes room for the cache, and takes the host's memory and seconds
    offloaded = command(recipe, "--nodes", "2", *colocated.split(), "0.8")
    print(offloaded.stdout, offloaded.stderr)
    moved = memory.weights + memory.optimizer
    assert offloaded.returncode == 0
    assert re.search(
        rf"while engines generate +{moved / 2**30:.2f} +{8 * moved / 2**30:.1f}\n", offloaded.stdout
    )
    seconds = f"GB/s: {2 * moved / 64e9:.1f} s at least"
    assert (
        f"turns             {moved / 1e9:.1f} GB of a rank" in offloaded.stdout
        and seconds in offloaded.stdout
    )


def test_refused_flags_are_one_line(plan, recipe, tmp_path):
    layout = flags_of(*LAYOUTS[0])
    for flags, message in (
        ("--expert-model-parallel-size 6", "--trainer-ranks 8"),
        (f"--hf-checkpoint {tmp_path}/none", "no such folder"),
        ("--rollout-only", "plan is for runs that train and generate"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            plan(f"{layout} {flags}")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hf-checkpoint {none}", "no such folder"),
        ("--mean-completion-tokens -4", "--mean-completion-tokens is -4, must be positive"),
        ("--mean-completion-tokens 0", "--mean-completion-tokens is 0, must be positive"),
        ("--mean-prompt-tokens -1", "--mean-prompt-tokens is -1, must be positive"),
        ("--sglang-mem-fraction-static 1.5", "--sglang-mem-fraction-static is 1.5, must be between 0 and 1"),
    ],
)
def test_nothing_is_planned_of_what_is_refused(recipe, tmp_path, capsys, flags, message):
    words = flags.format(none=tmp_path / "none").split()
    assert run(["plan", str(recipe), "--nodes", "4", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1
