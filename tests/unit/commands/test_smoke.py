"""The parts of `megatron-vespo smoke` that start nothing: what fits, which flags stay, bounds, the table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_vespo.arguments.recipe import read_recipe
from megatron_vespo.commands.main import run
from megatron_vespo.commands.smoke import command
from megatron_vespo.commands.smoke.command import checked_layout, parse
from megatron_vespo.commands.smoke.fit import Nodes, Wanted, fit, nodes_of
from megatron_vespo.commands.smoke.flags import kept, num_prompts, wanted_layout
from megatron_vespo.commands.smoke.log_probs import BOUNDS_BF16, BOUNDS_FP32, compare
from megatron_vespo.commands.smoke.model import config_for, write_config, write_weights
from megatron_vespo.commands.smoke.run import SmokeRun, all_stages
from megatron_vespo.commands.smoke.stages import CheckFailed, Stage, Stages, Stopped
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rollout.sglang_server import EngineError
from tests.support.builders import make_sample

RECIPES = sorted((Path(__file__).parents[3] / "examples").glob("*/*.flags"))
SYNCHRONOUS = Wanted(tp=2, ep=8, ranks=16, engines=8, engine_size=2)
COLOCATED = Wanted(tp=2, ep=8, ranks=32, engines=16, engine_size=2, colocate=True)
ANY = Wanted(tp=2, ep=2)  # as many ranks and engines as there is room for


def gpus(*nodes: int) -> Nodes:
    return Nodes(nodes, nodes, on_gpus=True)


def cores(*nodes: int) -> Nodes:
    return Nodes(nodes, nodes, on_gpus=False)


@pytest.mark.parametrize(
    ("wanted", "nodes", "layout"),
    [
        (SYNCHRONOUS, gpus(8, 8, 8, 8), "tp2,ep8 on 16 ranks, 8 engines of 2"),
        (SYNCHRONOUS, gpus(8, 8), "tp2,ep8 on 8 ranks, 2 engines of 2"),
        (SYNCHRONOUS, gpus(8), "tp2,ep4 on 4 ranks, 1 engine of 2"),
        (SYNCHRONOUS, gpus(1, 1, 1), "tp2,ep2 on 2 ranks, 1 engine of 1"),
        (SYNCHRONOUS, gpus(2), "tp1 on 1 rank, 1 engine of 1"),
        (COLOCATED, gpus(8, 8, 8, 8), "tp2,ep8 on 32 ranks, 16 engines of 2 on the same GPUs"),
        (COLOCATED, gpus(8), "tp2,ep8 on 8 ranks, 1 engine of 2 on the same GPUs"),
        (COLOCATED, gpus(1), "tp1 on 1 rank, 1 engine of 1 on the same GPUs"),
        (COLOCATED, cores(4), "tp2,ep2 on 2 ranks, 1 engine of 2 on the same GPUs"),
        (ANY, gpus(8), "tp2,ep2 on 6 ranks, 1 engine of 1"),
        (ANY, gpus(8, 8), "tp2,ep2 on 14 ranks, 2 engines of 1"),
        (ANY, cores(2, 2), "tp2,ep2 on 2 ranks, 2 engines of 1"),
        (ANY, cores(3), "tp2,ep2 on 2 ranks, 1 engine of 1"),
        (Wanted(pp=2, vpp=2, ranks=2, engines=1), gpus(2), "tp1 on 1 rank, 1 engine of 1"),
    ],
)
def test_what_fits(wanted, nodes, layout):
    assert str(fit(wanted, nodes)) == layout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
@pytest.mark.parametrize("nodes", [gpus(8), gpus(8, 8), gpus(4, 4, 4), gpus(*[8] * 16), cores(3)])
def test_a_fitted_recipe_lies_on_the_nodes(recipe, nodes):
    """Counted here once more."""
    wanted = wanted_layout(read_recipe(recipe))
    found = fit(wanted, nodes)
    assert (
        found.ranks % (found.tp * found.cp * found.pp) == found.ranks % (found.pp * found.etp * found.ep) == 0
    )
    assert found.engines <= sum(places // found.engine_size for places in nodes.engines)
    beside = (
        0
        if found.colocate and nodes.on_gpus
        else found.engines * (1 if found.colocate else found.engine_size)
    )
    assert found.ranks + beside <= sum(nodes.trainer)
    if found.colocate:
        assert found.engines * found.engine_size <= found.ranks


def test_nothing_fits():
    with pytest.raises(
        ValueError, match="1 node, 1 GPU: a trainer and an engine apart do not fit: --colocate"
    ):
        fit(SYNCHRONOUS, gpus(1))
    with pytest.raises(ValueError, match="do not fit"):
        fit(SYNCHRONOUS, Nodes((8,), (), on_gpus=True, apart=True))


def test_nodes_with_roles():
    told = [
        {"CPU": 4.0, "GPU": 8.0, "t": 1.0},
        {"CPU": 4.0, "GPU": 4.0, "e": 1.0},
        {"CPU": 4.0, "GPU": 4.0, "e": 1.0},
    ]
    nodes = nodes_of(told, "t", "e")
    assert nodes == Nodes((8,), (4, 4), on_gpus=True, apart=True) and str(nodes) == "3 nodes, 16 GPUs"
    assert str(fit(SYNCHRONOUS, nodes)) == "tp2,ep8 on 8 ranks, 2 engines of 2"
    assert nodes_of([{"CPU": 2.0}, {"CPU": 2.0}], "t", "e") == cores(2, 2)


def test_what_a_recipe_keeps():
    flags = (
        "--hf-checkpoint m --prompt-data d --eval-data h --bf16 --lr 1e-6 --lr-decay-style cosine "
        "--max-staleness 8 --recompute-granularity full --sglang-tp-size 2 --sglang-mem-fraction-static 0.8 "
        "--vespo-positive 2 3 --optimizer-cpu-offload --trainer-ranks=4"
    ).split()
    on_cpus = "--bf16 --vespo-positive 2 3".split()
    assert kept(flags, on_gpus=False) == on_cpus
    assert sorted({*kept(flags, on_gpus=True)} - {*on_cpus}) == [
        "--optimizer-cpu-offload", "--recompute-granularity", "--sglang-mem-fraction-static", "0.8", "full",
    ]  # fmt: skip


def test_other_models_of_a_run_are_left_out():
    """The reference is the small model, too; engines in FP8 need wider layers than those for CPUs."""
    flags = (
        "--teacher-checkpoint math=/m/a code=/m/b --teacher-tp-size 4 --reward-coefficient 0 "
        "--distillation-clip 2 --reference-checkpoint /m/r --kl-coef 0.1 --kl-loss-coef 0.1 "
        "--rollout-quantization fp8"
    ).split()
    kl = "--kl-coef 0.1 --kl-loss-coef 0.1".split()
    assert kept(flags, on_gpus=False) == kl
    assert kept(flags, on_gpus=True) == [*kl, "--rollout-quantization", "fp8"]
    assert checked_layout(flags, cores(3), timeout_s=60).engines == 1


def test_with_a_penalty_the_samples_have_the_references_log_probs():
    """The loss may want them as well, and `prepare` does not compute them again."""
    got = []
    reference = [np.full(3, -float(i), np.float32) for i in range(4)]
    trainer = SimpleNamespace(
        reference_log_probs=lambda mini_batches: reference,
        prepare=lambda mini_batches: got.extend(sample for batch in mini_batches for sample in batch),
        train_step=lambda index: {"loss": 0.0, "grad_norm": 1.0},
        log_probs=lambda samples: [np.ones(3)] * len(samples),
    )
    settings = SimpleNamespace(
        rollout=SimpleNamespace(steps_per_rollout=2, seed=1), loss=SimpleNamespace(kl_coef=0.1),
        trainer=SimpleNamespace(bf16=True),
    )  # fmt: skip
    controller = SimpleNamespace(trainer=trainer, state=SimpleNamespace(iteration=0))
    smoke = SmokeRun(settings, 0, all_stages(False))
    smoke._train(controller, [make_sample(2, 3) for _ in range(4)], [np.zeros(3)] * 4, Stage("train", ""))
    found = [sample.reference_log_probs for sample in got]
    assert all(one is other for one, other in zip(found, reference, strict=True))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_are_taken(recipe):
    """By Megatron's own checks, with everything that they say of how it is computed."""
    _, flags = parse([str(recipe)])
    layout = checked_layout([word for word in flags if word != "--bf16"], cores(3), timeout_s=60)
    assert (layout.ranks, layout.engines) == (2, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tensor-model-parallel-size two", "--tensor-model-parallel-size two: must be a positive number"),
        ("--sglang-no-such-flag 1", "--sglang-no-such-flag: SGLang "),
        ("--timeout 0", "--timeout is 0, must be positive"),
        ("no-such-file", "recipe no-such-file: No such file or directory"),
        ("--recipe no-such-file", "recipe no-such-file: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["smoke", *flags.split()]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"megatron-vespo: {message}") and said.err.count("\n") == 1
    assert said.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--no-such-flag 1", "--routing-replay R9"])
def test_a_wrong_flag_of_train(flag, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "look_around", lambda address: cores(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(["smoke", *flag.split()])
    assert stopped.value.code == 2
    assert flag.split()[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    """On a machine that is not made for it, CPUs are no substitute: a broken driver must not pass."""
    monkeypatch.setattr(command, "has_runtime_plugins", lambda: False)
    monkeypatch.setattr(command, "start_ray", lambda *arguments: None)
    monkeypatch.setattr(command, "node_resources", lambda: [{"CPU": 64.0}])
    assert run(["smoke", "--output-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert (
        "FAIL cluster: Ray has no GPU on 1 node, and CPUs alone need the environment of patches/cpu" in said
    )
    told = json.loads((tmp_path / "smoke.json").read_text())
    assert not told["ok"] and [stage["result"] for stage in told["stages"][:2]] == ["FAIL", "not run"]


def test_prompts_for_every_rank_and_engine():
    assert num_prompts(SYNCHRONOUS) == 2 * 8
    assert num_prompts(Wanted(tp=4, ranks=4, engines=5)) == 2 * 5
    assert num_prompts(Wanted(pp=2, vpp=2, ranks=4, engines=1)) == 2 * 4


@pytest.mark.parametrize("layout", [Wanted(), Wanted(tp=8, ep=3, pp=2, vpp=2), Wanted(engine_size=16)])
def test_the_model_can_be_cut(layout, tmp_path):
    config = config_for(layout, on_gpus=False, max_length=64)
    assert config["num_hidden_layers"] % (layout.pp * layout.vpp) == 0 and config["num_hidden_layers"] >= 2
    assert config["num_experts"] % layout.ep == 0
    assert config["num_key_value_heads"] % max(layout.tp, layout.engine_size) == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    write_config(tmp_path / "model", config)
    number = write_weights(tmp_path / "model", torch.bfloat16, seed=0)
    tensors = load_file(tmp_path / "model/model.safetensors")
    assert number == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors["model.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("bounds", [BOUNDS_FP32, BOUNDS_BF16])
def test_log_probs_beyond_rounding(bounds):
    ours = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
    assert compare(ours, ours, bounds, "x").startswith("3 tokens differ by 0.0e+00")
    for wrong in (3.1 * bounds.mean, np.nan):
        theirs = [ours[0], ours[1] + np.float32(wrong)]
        with pytest.raises(CheckFailed, match="x: 3 tokens differ by .*; rounding makes"):
            compare(ours, theirs, bounds, "x")
    many = [np.zeros(10_000, np.float32)]
    one_wrong = [np.append(np.zeros(9_999), 1.1 * bounds.largest)]
    with pytest.raises(CheckFailed):
        compare(many, one_wrong, bounds, "x")


def test_stages(tmp_path):
    stages = all_stages(colocate=False)
    stages.stream = io.StringIO()
    with stages.stage("model") as row:
        row.bytes, row.seconds = 3_000_000, 2.0
        with stages.phase("inside"):
            pass
    with stages.stage("decoded log-probs"):
        raise CheckFailed("they differ")
    with pytest.raises(Stopped), stages.phase("train"):
        raise EngineError("engine 0 died (exit status 2)", "end of a log:\nfirst\nlast words")
    stages.print_table()
    said = stages.stream.getvalue()
    assert "model: ok, 2.0 s, 3.0 MB\n" in said and "1.5 MB/s" in said and "inside" not in said
    assert "FAIL decoded log-probs: they differ\n     try: which side is wrong" in said
    assert "FAIL train: engine 0 died (exit status 2); end of a log: ... last words\n" in said
    assert said.endswith(
        "     try: " + next(row.hint for row in stages.rows if row.name == "start SGLang") + "\n"
    )
    assert not stages.ok
    stages.write(tmp_path / "smoke.json", {"nodes": "2 nodes"})
    told = json.loads((tmp_path / "smoke.json").read_text())
    assert not told["ok"] and told["nodes"] == "2 nodes"
    by_name = {stage["name"]: stage for stage in told["stages"]}
    assert by_name["model"]["bytes_per_second"] == 1_500_000
    assert by_name["resume"]["result"] == "not run" and "colocated turn" not in by_name


def test_submit(capsys, monkeypatch):
    recipe = next(path for path in RECIPES if path.stem == "colocated_n8")
    words = ["submit", str(recipe), "--nodes", "2", "--smoke", "--dry-run", "--seed", "7"]
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "checked: tp2,ep8 on 16 ranks, 2 engines of 2 on the same GPUs"
    lines = [line.strip(" \\") for line in shown.splitlines()[:-1]]
    options = ["--job-name=smoke-colocated_n8", "--nodes=2", "--gpus-per-node=8"]
    assert lines[:5] == ["sbatch", "--parsable", *options] and lines[5].endswith("/slurm/smoke.sbatch")
    assert lines[-2:] == [str(recipe), "--seed 7"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chain 2", "--chain 2 is for a run that goes on in the next job, --smoke does not"),
        ("--ray-address auto", "--ray-address is the job script's to say: leave it out"),
        (
            "--nodes 1 --gpus-per-node 1",
            "1 node, 1 GPU: a trainer and an engine apart do not fit: --colocate",
        ),
        ("--fp16", "--fp16: policy and engines share fp32 or, with --bf16, bfloat16"),
    ],
)
def test_submit_refuses(flags, message, capsys):
    recipe = next(path for path in RECIPES if path.stem == "synchronous_n8")
    assert run(["submit", str(recipe), "--nodes", "2", "--smoke", "--dry-run", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_stages_can_stand_in_for_the_display_of_a_run():
    of_the_loop = {"start", "stop", "recall", "update", "watch_engines", "current_phase"}
    called = {name for name in vars(RunDisplay) if not name.startswith("_")} - of_the_loop
    assert "progress" in called
    assert [name for name in sorted(called) if not hasattr(Stages, name)] == []
