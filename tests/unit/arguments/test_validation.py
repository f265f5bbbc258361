"""Sound flags pass; each mistake gets one line."""

import argparse
import math
from argparse import Namespace

import pytest

from megatron_vespo.arguments.layout import check_layout
from megatron_vespo.arguments.rewards import resolved_reward_function
from megatron_vespo.arguments.time_limits import TIME_LIMITS
from megatron_vespo.arguments.training_flags import add_vespo_arguments, check_flags
from tests.support.refusals import check_refusal

# 8 ranks as tensor 2 x pipeline 2 x data 2, experts over 4 of them
LAYOUT = {
    "trainer_ranks": 8, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1, "context_parallel_size": 1,
    "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None, "fp16": False, "bf16": False, "optimizer_cpu_offload": False,
    "distributed_backend": "nccl", "load": None, "save": None, "on_alarm": "warn",
    "num_distributed_optimizer_instances": 1, "train_iters": 16, "steps_per_rollout": 8, "lr": 1e-6,
    "min_lr": None, "lr_warmup_iters": 0, "lr_decay_iters": None, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_eps": 1e-8, "clip_grad": 1.0, "weight_decay": 0.0, "seq_length": 100, "max_prompt_tokens": 40,
    "max_completion_tokens": 60, "max_tokens_per_gpu": 100, "routing_replay": None,
    "moe_router_fusion": False, "rotary_interleaved": False, "moe_router_topk": 2,
    "moe_aux_loss_coeff": [0.0], "moe_z_loss_coeff": None,
    "max_position_embeddings": 100, "global_batch_size": 32, "num_attention_heads": 8, "num_query_groups": 4,
    "moe_shared_expert_intermediate_size": None, "moe_layer_freq": 1,
    "num_experts": 8, "moe_ffn_hidden_size": 6, "ffn_hidden_size": 16, "num_layers": 4,
}  # fmt: skip
NO_EXPERTS = {"num_experts": None, "expert_model_parallel_size": 1, "moe_ffn_hidden_size": None}


@pytest.fixture
def parse(tmp_path):
    """A sound command line of ours, with some flags replaced."""
    required = ["--hf-checkpoint", str(tmp_path), "--prompt-data", "train.jsonl", "--output-dir", "out"]
    return lambda argv="": add_vespo_arguments(argparse.ArgumentParser()).parse_args(
        [*required, *argv.split()]
    )


@pytest.fixture
def refusal(parse):
    def line(argv: str) -> str:
        with pytest.raises(ValueError) as error:
            check_flags(parse(argv))
        return str(error.value)

    return line


def layout(**changes) -> Namespace:
    assert not changes.keys() - LAYOUT.keys()
    return Namespace(**LAYOUT | changes)


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--mismatch-correction reject-k3 --mismatch-bounds 0 0.1",
        "--group-size 1 --advantage-estimator global",
        "--policy-loss bapo --dual-clip 3",
        "--mismatch-correction token-mask --ratio-denominator decoupled",
        "--vespo-positive 0 0 --steps-per-rollout 32 --group-size 2",
        "--weight-check-interval 0",
        "--reward-function code --code-reward share --code-sandbox-url http://host:80",
        "--code-timeout 100",
        "--rollout-engines 4 --min-engines 4 --engine-restarts 0",
        "--old-policy snapshot --routing-replay R3 --max-logprob-difference 0.1",
        "--old-policy ewma --routing-replay R2 --mismatch-correction tis",
        "--old-policy snapshot --ratio-denominator decoupled --mismatch-correction reject-k3",
        "--max-staleness 8",
        "--max-staleness 8 --sync-interval 2 --on-weight-update in-place",
        "--max-staleness 16 --sync-interval 16 --stale-groups drop",
        "--max-staleness 8 --old-policy snapshot --old-policy-snapshots 9",
        "--max-staleness 8 --dynamic-sampling --over-subscription 1.5 --stop-generation-while-training",
        "--max-staleness 8 --on-weight-update abort",
        "--max-staleness 8 --routing-replay R3",
        "--max-staleness 8 --routing-replay R3 --on-weight-update in-place",
        "--sync-interval 8",
        "--environment my:Game --reward-function environment --turn-rewards last",
        "--generate-function my:agent --reward-function environment",
    ],
)
def test_sound_flags_pass(parse, argv):
    check_flags(parse(argv))


@pytest.mark.parametrize("flag", ["--hf-checkpoint", "--prompt-data", "--output-dir"])
def test_a_required_flag_is_missing(parse, flag):
    args = parse()
    setattr(args, flag[2:].replace("-", "_"), None)
    with pytest.raises(ValueError, match=f"^{flag} is required; see --help$"):
        check_flags(args)


COUNTS = (
    "rollout-batch-size group-size steps-per-rollout max-prompt-tokens max-completion-tokens rollout-engines "
    "trainer-ranks max-tokens-per-gpu reward-workers eval-interval eval-prompts eval-completions "
    "weight-sync-bucket-mb dynamic-sampling-max-batches min-engines old-policy-snapshots sync-interval "
    "max-attempts"
).split()
POSITIVE = ["--rollout-temperature", "--mismatch-truncation", "--reward-memory-gb", "--overlong-penalty"]
POSITIVE += [limit.flag for limit in TIME_LIMITS]


@pytest.mark.parametrize(
    "argv",
    [f"--{flag} {value}" for flag in COUNTS for value in ("0", "-3")]
    + [f"{flag} {value}" for flag in POSITIVE for value in ("0", "-1.5", "nan")]
    + [f"--ewma-decay {value}" for value in ("0", "1", "nan")]
    + [f"--pair-length-gap {value}" for value in ("-0.1", "1", "nan")]
    + [f"--vespo-budget {value}" for value in ("0", "nan")]
    + ["--overlong-penalty inf", "--setup-seconds -7", "--engine-restarts -1", "--eval-temperature -1"]
    + ["--weight-check-interval -1", "--max-staleness -1", "--vespo-negative 3 nan", "--vespo-negative inf 2"]
    + ["--vespo-positive -1 2", "--hf-checkpoint /nowhere/at/all"]
    + [f"--kl-coef {value}" for value in ("0", "-0.1", "inf", "nan")]
    + [f"--kl-loss-coef {value}" for value in ("-0.1", "inf", "nan")]
    + ["--reference-update-interval 0"],
)
def test_a_value_is_out_of_range(refusal, argv):
    check_refusal(refusal(argv), argv)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("", "math"),
        ("--environment my:Game", "environment"),
        ("--environment my:Game --reward-function math", "math"),
        ("--generate-function my:agent", "math"),
        ("--reward-function http://host/score", "http://host/score"),
    ],
)
def test_an_environment_rewards_unless_a_function_is_named(parse, argv, name):
    assert resolved_reward_function(parse(argv)) == name


VESPO, GRPO, BAPO = (f"--policy-loss {name}" for name in ("vespo", "grpo", "bapo"))
DENOMINATOR = "--ratio-denominator"


@pytest.mark.parametrize(
    "row",
    [
        ("--min-engines 5 --rollout-engines 4", "--rollout-engines 4"),
        ("--reward-function environment", "--environment"),
        ("--turn-rewards last", "--environment"),
        ("--max-turns 3", "--environment"),
        ("--max-turn-tokens 8", "--environment"),
        ("--environment-timeout 5", "--environment"),
        ("--weight-sync disk", "--weight-sync-folder"),
        ("--weight-sync-folder x", "--weight-sync disk"),
        ("--weight-sync-folder /dev/null/x --weight-sync disk", "/dev/null is not a folder"),
        ("--weight-sync disk --weight-sync-folder x --colocate", "--colocate"),
        ("--weight-sync broadcast --weight-sync-staging --max-staleness 8", "--weight-sync broadcast"),
        ("--weight-sync disk --weight-sync-folder x --weight-sync-staging --max-staleness 8",
         "--weight-sync-staging"),
        ("--eval-temperature 0 --eval-completions 4", "4 times"),
        ("--code-timeout 10 --reward-function code", "--reward-timeout 10"),
        ("--code-test-timeout 9 --reward-function code", "--code-timeout 8"),
        ("--code-timeout 0 --reward-function code", "must be positive"),
        ("--code-memory-mb 0 --reward-function code", "must be positive"),
        *((f"--code-sandbox-url {url} --reward-function code", "http://HOST:PORT")
          for url in ("host:80", "http://", "http://host:99999", "http://[")),
        ("--group-size 1", "group-mean", "global"),
        ("--group-size 1 --advantage-estimator leave-one-out", "leave-one-out", "global"),
        ("--group-size 1 --advantage-estimator global --dynamic-sampling", "--dynamic-sampling"),
        ("--group-size 1 --advantage-estimator global --rollout-batch-size 1 --steps-per-rollout 1",
         "--rollout-batch-size 1"),
        ("--rollout-batch-size 32 --steps-per-rollout 5", "--steps-per-rollout 5"),
        ("--overlong-buffer 65 --max-completion-tokens 64", "--max-completion-tokens 64"),
        ("--overlong-buffer -1", "--max-completion-tokens 1024"),
        ("--policy-loss vespo-mean --vespo-budget 1.2", "--vespo-budget"),
        ("--policy-loss grpo --vespo-budget 1.2", "--vespo-budget"),
        ("--vespo-negative 0.5 2 --vespo-budget 1.2", "--vespo-budget", "C1", "1"),
        ("--vespo-positive 2 0.1 --vespo-budget 1.2", "--vespo-budget", "C2", "0.27 and 6.73"),
        (f"{DENOMINATOR} decoupled {GRPO}", GRPO, "recomputed or rollout"),
        (f"{DENOMINATOR} decoupled-token --policy-loss sapo", "--policy-loss sapo", "recomputed or rollout"),
        (f"--dual-clip 1 {GRPO}",),
        (f"--dual-clip inf {BAPO}",),
        (f"--loss-target 1 {BAPO}", "0 and 1"),
        (f"--clip-range 0 0.2 {GRPO}",),
        *((f"--policy-loss {loss} {argv}", argv.split()[0], "no effect") for loss, argv in (
            ("vespo", "--dual-clip 3"), ("vespo", "--clip-range 0.1 0.2"), ("gspo", "--sapo-tau 1 1"),
            ("grpo", "--loss-target 0.5"), ("bapo", "--clip-range 0.1 0.2"),
        )),
        ("--mismatch-correction tis --ratio-denominator decoupled", f"{DENOMINATOR} decoupled", VESPO,
         "token-mask, reject-product, reject-geometric, reject-k3"),
        (f"--mismatch-correction reject-k3 {DENOMINATOR} rollout {GRPO}", f"{DENOMINATOR} rollout", GRPO),
        (f"--mismatch-correction kpop {DENOMINATOR} rollout", f"{DENOMINATOR} rollout", "opsm"),
        ("--mismatch-correction importance --policy-loss gspo", "gspo", "tis, sequence-tis or icepop"),
        ("--mismatch-bounds 0.5 2", "no effect", "--mismatch-correction none"),
        (f"--mismatch-bounds 0 2 --mismatch-correction importance {GRPO}", "no effect", "importance"),
        *((f"--mismatch-bounds {bounds} --mismatch-correction {name}", f"and {agreement},", name)
          for name, bounds, agreement in (
              ("tis", "-1 2", 1), ("tis", "1.5 2", 1), ("icepop", "0.5 0.9", 1), ("icepop", "1 1", 1),
              ("token-mask", "0.5 inf", 1), ("token-mask", "0.5 nan", 1), ("reject-k3", "0.001 1", 0),
              ("opsm", "-1 1", 0),
          )),
        (f"--old-policy snapshot {DENOMINATOR} rollout", f"{DENOMINATOR} rollout"),
        (f"--old-policy ewma {DENOMINATOR} rollout", f"{DENOMINATOR} rollout"),
        ("--old-policy snapshot --routing-replay R2", "--routing-replay R2", "R3"),
        ("--old-policy ewma --max-logprob-difference 0.1", "--max-logprob-difference"),
        (f"--routing-replay R2 {DENOMINATOR} rollout", f"{DENOMINATOR} rollout", "R3"),
        ("--reference-update-interval 4", "--kl-coef or --kl-loss-coef"),
        ("--reference-checkpoint /tmp", "--kl-coef or --kl-loss-coef"),
        ("--reference-checkpoint /nowhere --kl-coef 0.1", "no such folder"),
        ("--unbiased-kl 2 --kl-coef 0.1", "--kl-loss-coef"),
        ("--unbiased-kl 2 --kl-loss-coef 0", "--kl-loss-coef"),
        ("--unbiased-kl 0.5 --kl-loss-coef 0.1", "at least 1"),
        ("--kl-loss-type k2 --kl-coef 0.1", "--kl-loss-coef"),
        ("--kl-loss-type k1 --kl-loss-coef 0", "--kl-loss-coef"),
        ("--sync-interval 4", "--max-staleness"),
        ("--sync-interval 3 --max-staleness 9", "divisor"),
        ("--max-staleness 7", "--steps-per-rollout 8 and --sync-interval 8", "7 optimizer"),
        ("--max-staleness 15 --sync-interval 16", "at least 16"),
        ("--max-staleness 8 --train-from r", "--train-from"),
        ("--max-staleness 8 --rollout-only", "--rollout-only"),
        ("--over-subscription 0.5 --max-staleness 8",),
        ("--over-subscription=2", "--max-staleness 8"),
        ("--stop-generation-while-training", "--max-staleness 8"),
        ("--max-staleness 8 --routing-replay R2", "--routing-replay R2", "R3"),
        ("--on-weight-update retract --max-staleness 8 --routing-replay R3", "--routing-replay R3", "abort"),
        ("--old-policy-snapshots 4 --max-staleness 8 --old-policy snapshot", "9"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(refusal, row):
    check_refusal(refusal(row[0]), *row)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NO_EXPERTS,
        {"expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2},
        {"expert_tensor_parallel_size": None, "expert_model_parallel_size": 2},  # then it is the tensor one
        {"trainer_ranks": 16},
        {"trainer_ranks": 16, "context_parallel_size": 2, "max_tokens_per_gpu": 50},
        {"trainer_ranks": 16, "context_parallel_size": 4, "max_tokens_per_gpu": 26, "routing_replay": "R3"},
        {"optimizer_cpu_offload": True, "bf16": True},
        {"num_layers": 5, "decoder_first_pipeline_num_layers": 2},
        {"num_layers": 5, "decoder_last_pipeline_num_layers": 2},
        {"num_layers": 5, "pipeline_model_parallel_layout": "Et*2|t*3L"},
        {"seq_length": 1},
        {"load": "/nowhere", "save": "/nowhere"},  # go on, or begin
        {"on_alarm": "stop"},
        {"on_alarm": "checkpoint-and-stop", "save": "/nowhere"},
        {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0},
    ],
)
def test_sound_layouts_pass(changes):
    check_layout(layout(**changes))


DENSE = "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size is"
EXPERT = "expert tensor x expert x pipeline parallel size is"
TENSOR, OFFLOAD, STEPS = "--tensor-model-parallel-size is 2", "--optimizer-cpu-offload", "--train-iters"
LONGEST = "--max-prompt-tokens 40 + --max-completion-tokens 60 = 100"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({f"{kind}_parallel_size": value}, [f"--{kind.replace('_', '-')}-parallel-size is {value}"])
          for kind in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor", "context")
          for value in (0, -2)),
        ({"moe_aux_loss_coeff": [0.01]}, ["--moe-aux-loss-coeff 0.01"]),
        ({"moe_aux_loss_coeff": [0.0, 0.5]}, ["--moe-aux-loss-coeff 0 0.5"]),
        ({"moe_z_loss_coeff": 1e-3}, ["--moe-z-loss-coeff 0.001"]),
        ({"trainer_ranks": 6}, [f"{DENSE} 4", "--trainer-ranks 6"]),
        ({"trainer_ranks": 1}, [f"{DENSE} 4", "--trainer-ranks 1"]),
        ({"trainer_ranks": 12}, [f"{EXPERT} 8", "--trainer-ranks 12"]),
        ({"context_parallel_size": 4}, [f"{DENSE} 16", "--trainer-ranks 8"]),
        ({"expert_tensor_parallel_size": None}, [f"{EXPERT} 16", "--trainer-ranks 8"]),
        ({"num_attention_heads": 9}, [TENSOR, "attention heads 9"]),
        ({"num_query_groups": 1}, [TENSOR, "key-value heads 1"]),
        (NO_EXPERTS | {"expert_model_parallel_size": 2}, ["--expert-model-parallel-size 2", "no experts"]),
        (NO_EXPERTS | {"routing_replay": "R3"}, ["--routing-replay R3", "no experts"]),
        (NO_EXPERTS | {"ffn_hidden_size": 9}, [TENSOR, "MLP width 9"]),
        ({"num_experts": 6}, ["--expert-model-parallel-size is 4", "experts 6"]),
        ({"moe_ffn_hidden_size": 5, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2},
         ["--expert-tensor-parallel-size is 2", "expert width 5"]),
        ({"moe_shared_expert_intermediate_size": 5}, [TENSOR, "shared experts' width 5"]),
        ({"moe_layer_freq": [0, 1, 1, 1], "ffn_hidden_size": 9}, [TENSOR, "MLP width 9"]),
        ({"num_layers": 5}, ["--pipeline-model-parallel-size is 2", "layers 5"]),
        ({"global_batch_size": 33}, ["33", "2 data-parallel ranks", "--rollout-batch-size, --group-size or"]),
        ({"num_distributed_optimizer_instances": 2}, ["--num-distributed-optimizer-instances 2"]),
        ({"on_alarm": "checkpoint-and-stop"}, ["--on-alarm checkpoint-and-stop", "--save"]),
        *(({"train_iters": value}, [STEPS, "required and must be positive"]) for value in (None, 0)),
        ({"train_iters": 20}, [f"{STEPS} 20", "--steps-per-rollout 8"]),
        ({"lr": None}, ["--lr", "required"]),
        ({"lr": -1.0}, ["--lr is -1"]),
        ({"min_lr": -math.inf}, ["--min-lr is -inf"]),
        ({"clip_grad": -7.0}, ["--clip-grad is -7"]),
        ({"adam_beta2": 1.0}, ["--adam-beta2 is 1", "below 1"]),
        ({"optimizer_cpu_offload": True}, [OFFLOAD, "--bf16"]),
        ({"optimizer_cpu_offload": True, "bf16": True, "distributed_backend": "gloo"}, [OFFLOAD, "GPU"]),
        ({"fp16": True}, ["--fp16", "--bf16"]),
        ({"rotary_interleaved": True}, ["--rotary-interleaved", "leave it out"]),
        ({"max_tokens_per_gpu": 99}, ["--max-tokens-per-gpu 99 x --context-parallel-size 1", LONGEST]),
        ({"context_parallel_size": 2, "max_tokens_per_gpu": 49, "seq_length": 99},
         ["--max-tokens-per-gpu 49 x --context-parallel-size 2", LONGEST]),
        ({"routing_replay": "R2", "moe_router_fusion": True}, ["--routing-replay", "--moe-router-fusion"]),
        ({"routing_replay": "R3", "num_experts": 512}, ["--routing-replay", "512 experts"]),
        ({"seq_length": 101, "max_tokens_per_gpu": 200},
         ["--max-prompt-tokens + --max-completion-tokens = 101", "100 positions"]),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(changes, words):
    with pytest.raises(ValueError) as error:
        check_layout(layout(**changes))
    text = str(error.value)
    assert "\n" not in text and [word for word in words if word not in text] == [], text
