"""The command line as a whole: our flags, Megatron's, SGLang's, and what is derived.

Parsing imports Megatron, which takes seconds and changes the process: one child does it for all tests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo import __version__
from megatron_vespo.algorithms.losses.clipped import grpo, gspo, sapo
from megatron_vespo.algorithms.losses.m2po import m2po
from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.algorithms.losses.weighted import topr, vespo
from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.arguments.parse import parse_args
from megatron_vespo.commands import main as cli
from megatron_vespo.models.hf_config import megatron_arguments
from megatron_vespo.rollout.server_arguments import engine_size, parse_sglang_flags
from megatron_vespo.system.plugins import load_runtime_plugins
from tests.support.refusals import check_refusal
from tests.support.train_flags import BASE, CONFIG


class Exited(Exception):
    """argparse ended the program: exit code, what it wrote to stderr."""


def parse_here(argv: list[str]) -> Namespace:
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            args = parse_args(argv)
    except SystemExit as error:
        raise Exited(error.code, stderr.getvalue()) from None
    # Megatron's own types would import Megatron into the parent
    plain = {
        name: value
        for name, value in vars(args).items()
        if not type(value).__module__.startswith("megatron.")
    }
    return Namespace(**plain)


def round_trip_here(argv: list[str]) -> bool:
    args = parse_args(argv)
    return pickle.loads(pickle.dumps(args)) == args


def megatron_destinations() -> set[str]:
    from megatron.training.arguments import add_megatron_arguments

    return {action.dest for action in add_megatron_arguments(argparse.ArgumentParser())._actions}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def parse(child, checkpoint):
    return lambda flags="": child(parse_here, ["--hf-checkpoint", str(checkpoint), *BASE, *flags.split()])


@pytest.fixture(scope="module")
def refusal(parse):
    def message_of(flags: str) -> str:
        with pytest.raises(ValueError) as error:
            parse(flags)
        return str(error.value)

    return message_of


@pytest.mark.long
def test_derived_names_are_megatrons_own(child):
    # a wrong name would be set on the namespace and read by nobody
    derived = megatron_arguments(CONFIG).keys() | {"global_batch_size", "micro_batch_size", "seq_length"}
    assert derived - child(megatron_destinations) == set()


def test_the_models_shape_arrives(parse):
    args = parse()
    for name, value in megatron_arguments(CONFIG).items():
        assert getattr(args, name) == value, name
    assert (args.num_layers, args.num_experts, args.kv_channels, args.rotary_base) == (4, 8, 8, 1000000)


def test_a_dense_models_shape_arrives(child, tmp_path):
    experts = {"num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
    experts |= {"mlp_only_layers", "decoder_sparse_step", "use_sliding_window"}
    config = {name: value for name, value in CONFIG.items() if name not in experts}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "rope_parameters": llama3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["--hf-checkpoint", str(tmp_path), *BASE]
    args = child(parse_here, command)
    assert (args.num_experts, args.use_rope_scaling, args.rope_scaling_factor) == (None, True, 8.0)
    assert not args.untie_embeddings_and_output_weights and not args.qk_layernorm
    with pytest.raises(ValueError, match="^--num-experts 8 contradicts the HF config, which makes it None$"):
        child(parse_here, [*command, "--num-experts", "8"])


# of the command line without more flags: ours, what makes an optimizer step one mini-batch, and Megatron's
# for reinforcement learning
DEFAULTS = {
    "loss_aggregation": "token-mean", "ratio_denominator": "recomputed", "mismatch_truncation": 2.0,
    "advantage_estimator": "group-mean", "apply_chat_template": True, "hf_export": True, "sglang_flags": [],
    "rollout_temperature": 1.0, "max_logprob_difference": None, "eval_data": None, "output_dir": Path("out"),
    "global_batch_size": 16 * 4 // 4, "micro_batch_size": 1, "seq_length": 50,
    "calculate_per_token_loss": True, "attention_dropout": 0, "hidden_dropout": 0, "weight_decay": 0,
    "adam_beta2": 0.95, "lr_decay_style": "constant", "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall", "use_distributed_optimizer": True,
    "distributed_timeout_minutes": 60, "moe_enable_routing_replay": False, "sequence_parallel": False,
    "padded_vocab_size": 97,
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", DEFAULTS),
        ("--weight-decay 0.1 --adam-beta2 0.999 --lr-decay-style cosine --seed 7 --bf16 --no-chat-template "
         "--no-hf-export --ratio-denominator decoupled --advantage-estimator global",
         {"weight_decay": 0.1, "adam_beta2": 0.999, "lr_decay_style": "cosine", "seed": 7, "bf16": True,
          "apply_chat_template": False, "hf_export": False, "ratio_denominator": "decoupled",
          "advantage_estimator": "global", "accumulate_allreduce_grads_in_fp32": True}),
        ("--distributed-timeout-minutes 90", {"distributed_timeout_minutes": 90}),
        ("--weight-check-timeout 7200", {"distributed_timeout_minutes": (7200 + 6 * 300) / 60 + 5}),
        ("--bf16 --distributed-backend nccl --transformer-impl local --optimizer-cpu-offload "
         "--use-precision-aware-optimizer --optimizer-offload-fraction 0.5",
         {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}),
        ("--routing-replay R3", {"moe_enable_routing_replay": True, "on_weight_update": "retract"}),
        ("--routing-replay R3 --max-staleness 8", {"on_weight_update": "abort"}),
        ("--routing-replay R3 --max-staleness 8 --on-weight-update in-place",
         {"on_weight_update": "in-place"}),
        # the nominal length divides by context parallelism
        ("--trainer-ranks 3 --context-parallel-size 3 --rollout-batch-size 12", {"seq_length": 54}),
        ("--group-size 1 --advantage-estimator global --steps-per-rollout 1 --rollout-batch-size 8",
         {"global_batch_size": 8}),
        ("--train-iters 4 --train-iters 12", {"train_iters": 12}),
        ("--trainer-ranks 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
         "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
         {"world_size": 4, "data_parallel_size": 1, "sequence_parallel": True, "padded_vocab_size": 98}),
        # they agree with the model
        ("--num-layers 4 --norm-epsilon 1e-6 --disable-bias-linear --swiglu --seq-length 50",
         {"num_layers": 4, "add_bias_linear": False}),
        *((f"--seed {seed}", {"seed": seed}) for seed in (1, 4294967295)),
        ("--sglang-mem-fraction-static 0.7 --seed 5 --sglang-disable-radix-cache --sglang-tp-size=2",
         {"sglang_flags": "--mem-fraction-static 0.7 --disable-radix-cache --tp-size 2".split(), "seed": 5}),
    ],
)  # fmt: skip
def test_what_is_derived_from_flags(parse, flags, expected):
    args = parse(flags)
    assert {name: getattr(args, name) for name in expected} == expected


SEQUENCES = "sequence-mean-token-mean"


@pytest.mark.parametrize(
    ("flags", "function", "options", "aggregation"),
    [
        ("", vespo, {"kernel": GammaKernel()}, "token-mean"),
        ("--vespo-positive 1 1.5 --vespo-negative 4 2.5", vespo,
         {"kernel": GammaKernel(positive=(1.0, 1.5), negative=(4.0, 2.5))}, "token-mean"),
        ("--policy-loss gspo", gspo, {"low": 3e-4, "high": 4e-4}, SEQUENCES),
        ("--policy-loss gspo --clip-range 0.1 0.2 --loss-aggregation token-mean", gspo,
         {"low": 0.1, "high": 0.2}, "token-mean"),
        ("--policy-loss sapo --sapo-tau 1 2", sapo, {"tau_positive": 1.0, "tau_negative": 2.0}, SEQUENCES),
        ("--policy-loss grpo --dual-clip 3", grpo, {"low": 0.2, "high": 0.28, "dual_clip": 3.0},
         "token-mean"),
        ("--policy-loss topr", topr, {}, SEQUENCES),
        ("--policy-loss m2po", m2po, {"target": 0.04}, "token-mean"),
        ("--policy-loss bapo --loss-target 0.5", grpo, {"target": 0.5}, "token-mean"),
    ],
)  # fmt: skip
def test_losses_take_their_own_options(parse, flags, function, options, aggregation):
    args = parse(flags)
    loss = LossSettings.of(args).bind().loss
    assert (loss.function, loss.options, args.loss_aggregation) == (function, options, aggregation)


TWO_STAGES = "--trainer-ranks 2 --pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    "row",
    [
        # what the HF config or other flags say already
        ("--num-layers 5", "HF config", "4"),
        ("--norm-epsilon 1e-05", "HF config", "1e-06"),
        ("--rotary-base 10000", "HF config", "1000000"),  # also Megatron's default: given is not left out
        ("--num-query-groups 1", "HF config", "2"),  # the same
        ("--add-qkv-bias", "True", "HF config", "False"),
        ("--global-batch-size 32", "--rollout-batch-size x --group-size / --steps-per-rollout", "16"),
        ("--seq-length 64", "--max-prompt-tokens + --max-completion-tokens", "50"),
        ("--micro-batch-size 2", "--max-tokens-per-gpu", "1"),
        # one check of our flags, one of the layout; test_validation.py has them all
        ("--steps-per-rollout 3", "--rollout-batch-size 16"),
        ("--trainer-ranks 2 --tensor-model-parallel-size 4", "--tensor-model-parallel-size x"),
        # what the model's shape and Megatron's kernels allow
        ("--fp32-residual-connection --bf16", "--transformer-impl is local"),
        ("--transformer-impl local --recompute-modules layernorm moe --recompute-granularity selective",
         "--recompute-modules layernorm", "core_attn, moe and mlp"),
        ("--max-prompt-tokens=227", "--max-completion-tokens = 257", "256 positions"),
        (f"--group-size=3 --rollout-batch-size 1 --steps-per-rollout 1 {TWO_STAGES} "
         "--num-layers-per-virtual-pipeline-stage 1", "3 completions", "in 2 micro-batches each"),
        # what only a rank, or a job, would say
        *((f"--seed {seed}", "4294967295") for seed in (0, -3, 4294967296)),
        (f"--seed 4294967295 {TWO_STAGES}", "4294967195"),
        ("--nccl-communicator-config-path /n/x.yaml", "no such file"),
        ("--wandb-project x", "--tracker wandb --tracker-project x"),
        ("--tracker none --tracker wandb", "leave one of them out"),
        ("--prometheus-port 65536", "between 0 and 65535"),
        ("--partition h100", "sbatch", "megatron-vespo submit"),
        ("--save $NOT_THERE/c", "the variable NOT_THERE is not set"),
        ("--output-dir ${NOT_THERE}/c", "the variable NOT_THERE is not set"),
        ("--distributed-timeout-minutes 10",),  # Megatron's own default
        ("--group-size 1", "--advantage-estimator group-mean"),
        ("--sglang-bogus=1", "has no flag --bogus"),
        ("--sglang-port=1", "sets SGLang's --port itself"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(refusal, row):
    check_refusal(refusal(row[0]), *row)


def test_virtual_stages_divide_the_layers(refusal):
    told = refusal(f"{TWO_STAGES} --num-virtual-stages-per-pipeline-rank 4")
    assert told == "2 pipeline stages of 4 virtual ones do not divide layers 4"


def test_sampling_of_sglang_is_not_changed_by_a_flag(refusal):
    flag = "--sglang-preferred-sampling-params"
    check_refusal(refusal(f'{flag}={{"top_p":0.9}}'), flag, "top_p 0.9")


def test_megatrons_own_refusals_get_one_line(refusal):
    assert refusal("--train-samples 100") == "Megatron refuses these flags: expected iteration-based training"
    # an assertion without a message: its source line
    assert refusal("--min-lr 1") == "Megatron refuses these flags: assert args.min_lr <= args.lr"


def test_missing_required_flags(child, checkpoint):
    model = ["--hf-checkpoint", str(checkpoint)]
    without_iters = [*model, *(flag for flag in BASE if flag not in ("--train-iters", "8"))]
    rows = {"--hf-checkpoint": [], "--prompt-data": model, "--train-iters": without_iters}
    for flag, argv in rows.items():
        with pytest.raises(ValueError, match=f"^{flag} .*is required"):
            child(parse_here, argv)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--bogus 1", "unrecognized arguments: --bogus 1"),
        # no abbreviations
        ("--train-ite 9", "unrecognized arguments: --train-ite 9; did you mean --train-iters?"),
        ("--reward-functon f", "unrecognized arguments: --reward-functon f; did you mean --reward-function?"),
        ("--trainer-ranks two", "argument --trainer-ranks: invalid int value: 'two'"),
        ("--ratio-denominator engine", "argument --ratio-denominator: invalid choice: 'engine'"),
        ("--vespo-positive 2", "argument --vespo-positive: expected 2 arguments"),
    ],
)
def test_what_argparse_refuses(parse, flags, says):
    with pytest.raises(Exited) as exit_:
        parse(flags)
    code, stderr = exit_.value.args
    assert code == 2
    assert says in stderr.splitlines()[-1]
    assert len(stderr) < 600  # Megatron's usage alone has 700 lines


def test_paths_are_expanded_in_flags_of_both(parse):
    args = parse("--save ~/c --load=$HOME/c --output-dir=~/o --tensorboard-dir ${HOME}/t --prompt-key ~")
    home = Path.home()
    assert (args.save, args.load) == (str((home / "c").resolve()), str((home / "c").resolve()))
    assert (args.output_dir, args.tensorboard_dir, args.prompt_key) == (home / "o", f"{home}/t", "~")


@pytest.mark.parametrize("flag", ["--output-dir", "--save", "--save-rollouts"])
@pytest.mark.parametrize("below", ["", "/run/1"])
def test_a_file_in_the_place_of_a_folder(refusal, flag, below, tmp_path):
    file = tmp_path / "train.jsonl"
    file.touch()
    check_refusal(refusal(f"{flag} {file}{below}"), f"{flag} {file}{below}", f": {file} is not a folder")


def test_another_model_is_refused_before_megatron_is_asked(child, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(
        ValueError, match="its architecture is GPT2LMHeadModel; supported: Qwen3MoeForCausalLM"
    ):
        child(parse_here, ["--hf-checkpoint", str(tmp_path), *BASE])


def test_arguments_survive_the_way_to_a_worker(child, checkpoint):
    assert child(round_trip_here, ["--hf-checkpoint", str(checkpoint), *BASE])


def test_the_parent_stayed_clean(parse):
    before = set(sys.modules)
    parse()
    assert not [name for name in sys.modules.keys() - before if name.partition(".")[0] == "megatron"]


HELP_AND_MODULES = """
import sys
from megatron_vespo.commands.main import run
code = run(["train", "--hf-checkpoint", "nowhere", "--help"])
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"megatron", "ray", "sglang", "transformers"}))
sys.exit(code)
"""


@pytest.mark.long
def test_help_shows_our_groups_and_imports_nothing_heavy():
    program = [sys.executable, "-c", HELP_AND_MODULES]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    groups = ("model and data", "rollout", "rewards", "policy loss", "placement", "weight sync", "output")
    for group in groups:
        assert f"\n{group}:\n" in done.stdout
    assert "--help-megatron lists them all" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def help_here(argv: list[str]) -> tuple[int, str]:
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        return cli.run(argv), stdout.getvalue()


def test_help_megatron_lists_megatrons_flags(child):
    code, text = child(help_here, ["train", "--help-megatron"])
    assert code == 0
    assert text.startswith("Megatron's flags")
    assert "\n  --tensor-model-parallel-size TENSOR_MODEL_PARALLEL_SIZE\n" in text
    assert "\n  --moe-router-topk MOE_ROUTER_TOPK\n" in text
    assert "%(default)s" not in text


@pytest.mark.parametrize(
    ("argv", "code", "stdout", "stderr"),
    [
        (["--help"], 0, cli.USAGE, ""),
        (["--version"], 0, f"megatron-vespo {__version__}\n", ""),
        ([], 2, cli.USAGE, ""),
        (
            ["serve"],
            2,
            "",
            f"megatron-vespo: no command 'serve'; there are: {', '.join(cli.COMMANDS)}\n",
        ),
    ],
)
def test_commands(capsys, argv, code, stdout, stderr):
    assert cli.run(argv) == code
    assert capsys.readouterr() == (stdout, stderr)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--lr is required"), 2, "--lr is required"),
        (RuntimeError("engine 0 ended"), 1, "engine 0 ended"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_goes_wrong_ends_in_one_line(capsys, monkeypatch, error, code, line):
    def main(argv):
        raise error

    # the real module imports Ray
    monkeypatch.setitem(sys.modules, "megatron_vespo.commands.train", Namespace(main=main))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert cli.run(["train"]) == code
    assert capsys.readouterr().err == f"megatron-vespo: {line}\n"


def test_runtime_plugins_are_called_once(monkeypatch):
    calls = []
    plugin = Namespace(load=lambda: lambda: calls.append("plugin"))

    def entry_points(group):
        assert group == "megatron_vespo.runtime"
        return [plugin, plugin]

    monkeypatch.setattr("megatron_vespo.system.plugins.entry_points", entry_points)
    load_runtime_plugins.cache_clear()
    try:
        load_runtime_plugins()
        load_runtime_plugins()
    finally:
        load_runtime_plugins.cache_clear()
    assert calls == ["plugin", "plugin"]


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("", 1),
        ("--sglang-tp-size 2", 2),
        ("--sglang-tp-size 2 --sglang-tensor-parallel-size 8 --sglang-dtype float32", 8),
    ],
)
def test_the_last_of_sglangs_sizes_counts(flags, size):
    assert engine_size(parse_sglang_flags(flags.split())[0]) == size
