"""Each mistake in the flags, and the one line that it gets."""

import argparse
import math
from argparse import Namespace

import pytest

from megatron_vespo.arguments.layout import check_layout
from megatron_vespo.arguments.time_limits import TIME_LIMITS
from megatron_vespo.arguments.training_flags import add_vespo_arguments, check_flags


@pytest.fixture
def flags(tmp_path):
    """A sound command line of ours, with some flags replaced."""
    required = ["--hf-checkpoint", str(tmp_path), "--prompt-data", "train.jsonl", "--output-dir", "out"]

    def parse(*argv: str) -> Namespace:
        return add_vespo_arguments(argparse.ArgumentParser()).parse_args([*required, *argv])

    return parse


def layout(**changes) -> Namespace:
    """A sound layout: 8 ranks as tensor 2 x pipeline 2 x data 2, experts over 4 of them."""
    args = Namespace(
        trainer_ranks=8,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        context_parallel_size=1,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        pipeline_model_parallel_layout=None,
        fp16=False,
        bf16=False,
        optimizer_cpu_offload=False,
        distributed_backend="nccl",
        load=None,
        save=None,
        on_alarm="warn",
        num_distributed_optimizer_instances=1,
        train_iters=16,
        steps_per_rollout=8,
        lr=1e-6,
        min_lr=None,
        lr_warmup_iters=0,
        lr_decay_iters=None,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=1.0,
        weight_decay=0.0,
        seq_length=100,
        max_prompt_tokens=40,
        max_completion_tokens=60,
        max_tokens_per_gpu=100,
        routing_replay=None,
        moe_router_fusion=False,
        moe_router_topk=2,
        moe_aux_loss_coeff=[0.0],
        moe_z_loss_coeff=None,
        max_position_embeddings=100,
        global_batch_size=32,
        num_attention_heads=8,
        num_query_groups=4,
        num_experts=8,
        moe_ffn_hidden_size=6,
        ffn_hidden_size=16,
        num_layers=4,
    )
    assert not changes.keys() - vars(args).keys()
    vars(args).update(changes)
    return args


NO_EXPERTS = {"num_experts": None, "expert_model_parallel_size": 1, "moe_ffn_hidden_size": None}


def test_a_dense_layout_passes():
    check_layout(layout(**NO_EXPERTS))


def message_of(check, args) -> str:
    with pytest.raises(ValueError) as error:
        check(args)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_sound_flags_pass(flags):
    check_flags(flags())
    check_flags(flags("--mismatch-correction", "reject-k3", "--mismatch-bounds", "0", "0.1"))
    check_flags(flags("--group-size", "1", "--advantage-estimator", "global"))
    check_flags(flags("--policy-loss", "bapo", "--dual-clip", "3"))
    check_flags(flags("--mismatch-correction", "token-mask", "--ratio-denominator", "decoupled"))
    check_flags(flags("--vespo-positive", "0", "0", "--steps-per-rollout", "32", "--group-size", "2"))


@pytest.mark.parametrize("flag", ["--hf-checkpoint", "--prompt-data", "--output-dir"])
def test_a_required_flag_is_missing(flags, flag):
    args = flags()
    setattr(args, flag[2:].replace("-", "_"), None)
    assert message_of(check_flags, args) == f"{flag} is required; see --help"


@pytest.mark.parametrize(
    "flag",
    [
        "--rollout-batch-size",
        "--group-size",
        "--steps-per-rollout",
        "--max-prompt-tokens",
        "--max-completion-tokens",
        "--rollout-engines",
        "--trainer-ranks",
        "--max-tokens-per-gpu",
        "--reward-workers",
        "--eval-interval",
        "--eval-prompts",
        "--weight-sync-bucket-mb",
        "--dynamic-sampling-max-batches",
    ],
)
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_are_positive(flags, flag, value):
    assert message_of(check_flags, flags(flag, value)) == f"{flag} is {value}, must be positive"


def test_weights_are_checked_every_so_many_syncs_or_on_resumes_only(flags):
    check_flags(flags("--weight-check-interval", "0"))
    assert message_of(check_flags, flags("--weight-check-interval", "-1")) == (
        "--weight-check-interval -1: must be positive, or 0 (on resumes only)"
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--engine-restarts -1", "--engine-restarts is -1, must be positive, or 0: none"),
        ("--min-engines 0", "--min-engines is 0, must be between 1 and --rollout-engines 1"),
        (
            "--rollout-engines 4 --min-engines 5",
            "--min-engines is 5, must be between 1 and --rollout-engines 4",
        ),
    ],
)
def test_engine_faults(flags, argv, said):
    check_flags(flags("--rollout-engines", "4", "--min-engines", "4", "--engine-restarts", "0"))
    assert message_of(check_flags, flags(*argv.split())) == said


POSITIVE = ["--rollout-temperature", "--mismatch-truncation", "--reward-memory-gb", "--overlong-penalty"]


@pytest.mark.parametrize("flag", POSITIVE + [limit.flag for limit in TIME_LIMITS])
@pytest.mark.parametrize("value", ["0", "-1.5", "nan"])
def test_real_numbers_are_positive(flags, flag, value):
    assert message_of(check_flags, flags(flag, value)) == f"{flag} is {value}, must be positive"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--eval-completions 0", "--eval-completions is 0, must be positive"),
        ("--eval-temperature -1", "--eval-temperature -1: must be positive, or 0 for greedy"),
        (
            "--eval-temperature 0 --eval-completions 4",
            "--eval-temperature 0 makes the same completion 4 times: one is enough",
        ),
        (
            "--group-size 1",
            "--group-size 1: --advantage-estimator group-mean compares the completions of a prompt and "
            "needs at least 2; global compares those of the rollout batch",
        ),
        (
            "--group-size 1 --advantage-estimator leave-one-out",
            "--group-size 1: --advantage-estimator leave-one-out compares the completions of a prompt "
            "and needs at least 2; global compares those of the rollout batch",
        ),
        (
            "--group-size 1 --advantage-estimator global --dynamic-sampling",
            "--group-size 1: --dynamic-sampling leaves out groups of equal rewards, which a group of 1 "
            "always is: leave it out",
        ),
        (
            "--group-size 1 --advantage-estimator global --rollout-batch-size 1 --steps-per-rollout 1",
            "--group-size 1 with --rollout-batch-size 1: one reward has nothing to be compared with",
        ),
        (
            "--rollout-batch-size 32 --steps-per-rollout 5",
            "--rollout-batch-size 32 prompts cannot be cut into --steps-per-rollout 5 equal parts",
        ),
        (
            "--max-completion-tokens 64 --overlong-buffer 65",
            "--overlong-buffer 65 must be between 0 (off) and --max-completion-tokens 64",
        ),
        (
            "--overlong-buffer -1",
            "--overlong-buffer -1 must be between 0 (off) and --max-completion-tokens 1024",
        ),
        (
            "--vespo-budget 1.2 --policy-loss vespo-mean",
            "--vespo-budget bounds the W of --policy-loss vespo, vespo-mean has another weight: leave it out",
        ),
        (
            "--vespo-budget 1.2 --policy-loss grpo",
            "--vespo-budget bounds the W of --policy-loss vespo, grpo has another weight: leave it out",
        ),
        ("--vespo-budget 0", "--vespo-budget 0 must be positive and finite"),
        ("--setup-seconds -7", "--setup-seconds is -7, must be 0 or more, and finite"),
        ("--vespo-budget nan", "--vespo-budget nan must be positive and finite"),
        (
            "--vespo-budget 1.2 --vespo-negative 0.5 2",
            "--vespo-budget starts at --vespo-negative 0.5 2: C1 must be at least 1, else nothing bounds the "
            "variance",
        ),
        (
            "--vespo-budget 1.2 --vespo-positive 2 0.1",
            "--vespo-budget starts at --vespo-positive 2 0.1: C2 must be between 0.27 and 6.73",
        ),
        ("--overlong-penalty inf", "--overlong-penalty inf: must be finite"),
        (
            "--vespo-positive -1 2",
            "--vespo-positive -1 2: exponents must be finite and not negative",
        ),
        (
            "--vespo-negative 3 nan",
            "--vespo-negative 3 nan: exponents must be finite and not negative",
        ),
        (
            "--vespo-negative inf 2",
            "--vespo-negative inf 2: exponents must be finite and not negative",
        ),
        (
            "--policy-loss grpo --ratio-denominator decoupled",
            "--policy-loss grpo weighs tokens, --ratio-denominator decoupled weighs whole responses: use "
            "recomputed or rollout",
        ),
        (
            "--policy-loss sapo --ratio-denominator decoupled-token",
            "--policy-loss sapo weighs tokens, --ratio-denominator decoupled-token weighs whole responses: "
            "use recomputed or rollout",
        ),
        (
            "--policy-loss vespo --dual-clip 3",
            "--dual-clip has no effect on --policy-loss vespo: leave it out",
        ),
        (
            "--policy-loss grpo --dual-clip 1",
            "--dual-clip 1: must be above 1 and finite",
        ),
        (
            "--policy-loss bapo --dual-clip inf",
            "--dual-clip inf: must be above 1 and finite",
        ),
        (
            "--policy-loss vespo --clip-range 0.1 0.2",
            "--clip-range has no effect on --policy-loss vespo: leave it out",
        ),
        (
            "--policy-loss gspo --sapo-tau 1 1",
            "--sapo-tau has no effect on --policy-loss gspo: leave it out",
        ),
        (
            "--policy-loss grpo --loss-target 0.5",
            "--loss-target has no effect on --policy-loss grpo: leave it out",
        ),
        (
            "--policy-loss bapo --loss-target 1",
            "--loss-target 1: must be between 0 and 1",
        ),
        (
            "--policy-loss bapo --clip-range 0.1 0.2",
            "--clip-range has no effect on --policy-loss bapo: leave it out",
        ),
        (
            "--policy-loss grpo --clip-range 0 0.2",
            "--clip-range 0 0.2: both must be positive and finite",
        ),
        (
            "--mismatch-correction tis --ratio-denominator decoupled",
            "--mismatch-correction tis with --ratio-denominator decoupled and --policy-loss vespo: decoupled "
            "has the truncated rho in W already, a weight would count it twice; use recomputed with the "
            "weight, or decoupled with a mask (token-mask, reject-product, reject-geometric, reject-k3)",
        ),
        (
            "--mismatch-correction reject-k3 --ratio-denominator rollout --policy-loss grpo",
            "--mismatch-correction reject-k3 with --ratio-denominator rollout and --policy-loss grpo: "
            "rollout compares with mu: all of rho is in the ratio and would be counted twice, and pi_old is "
            "not computed; use recomputed with the correction, or rollout alone",
        ),
        (
            "--mismatch-correction importance --policy-loss gspo",
            "--mismatch-correction importance with --ratio-denominator recomputed and --policy-loss gspo: "
            "importance completes a token's ratio, rho r = pi / mu, and this loss has no token ratios; use "
            "tis, sequence-tis or icepop",
        ),
        (
            "--mismatch-bounds 0.5 2",
            "--mismatch-bounds 0.5 2 has no effect on --mismatch-correction none: leave it out",
        ),
        (
            "--mismatch-correction importance --policy-loss grpo --mismatch-bounds 0 2",
            "--mismatch-bounds 0 2 has no effect on --mismatch-correction importance: leave it out",
        ),
        *(
            (
                f"--mismatch-correction {name} --mismatch-bounds {bounds}",
                f"--mismatch-bounds {bounds}: LOW must be at least 0, HIGH finite and above it, and "
                f"{agreement}, which --mismatch-correction {name} compares where engine and trainer agree, "
                "between them",
            )
            for name, bounds, agreement in (
                ("tis", "-1 2", 1),
                ("tis", "1.5 2", 1),
                ("icepop", "0.5 0.9", 1),
                ("icepop", "1 1", 1),
                ("token-mask", "0.5 inf", 1),
                ("token-mask", "0.5 nan", 1),
                ("reject-k3", "0.001 1", 0),
            )
        ),
        (
            "--old-policy snapshot --ratio-denominator rollout",
            "--old-policy snapshot: --ratio-denominator rollout computes no pi_old; use another or leave "
            "it out",
        ),
        (
            "--old-policy ewma --ratio-denominator rollout",
            "--old-policy ewma: --ratio-denominator rollout computes no pi_old; use another or leave it out",
        ),
        (
            "--old-policy snapshot --routing-replay R2",
            "--old-policy snapshot: a response may have tokens of several versions, --routing-replay R2 "
            "replays the routes of one; use R3",
        ),
        (
            "--old-policy ewma --max-logprob-difference 0.1",
            "--old-policy ewma: no engine has served the average, --max-logprob-difference would compare it "
            "with one; leave one out",
        ),
        ("--ewma-decay 1", "--ewma-decay is 1, must be between 0 and 1"),
        ("--ewma-decay 0", "--ewma-decay is 0, must be between 0 and 1"),
        ("--ewma-decay nan", "--ewma-decay is nan, must be between 0 and 1"),
        ("--old-policy-snapshots 0", "--old-policy-snapshots is 0, must be positive"),
        (
            "--routing-replay R2 --ratio-denominator rollout",
            "--routing-replay R2 replays the routes of pi_old, which --ratio-denominator rollout does not "
            "compute: use R3, or another denominator",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags, argv, message):
    assert message_of(check_flags, flags(*argv.split())) == message


def test_checkpoint_folder_that_does_not_exist(flags, tmp_path):
    args = flags("--hf-checkpoint", str(tmp_path / "nowhere"))
    assert message_of(check_flags, args) == f"--hf-checkpoint {tmp_path}/nowhere: no such folder"


@pytest.mark.parametrize(
    "changes",
    [
        {},
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
    ],
)
def test_sound_layouts_pass(changes):
    check_layout(layout(**changes))


WHY_NO_ROUTER_LOSS = (
    "Megatron divides this loss by the denominator of --loss-aggregation, its size would depend on that, on "
    "packs and on the layout: leave it out"
)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"moe_aux_loss_coeff": [0.01]}, "--moe-aux-loss-coeff 0.01"),
        ({"moe_aux_loss_coeff": [0.0, 0.5]}, "--moe-aux-loss-coeff 0 0.5"),
        ({"moe_z_loss_coeff": 1e-3}, "--moe-z-loss-coeff 0.001"),
    ],
)
def test_losses_of_the_router_are_refused(changes, given):
    check_layout(layout(moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0))
    assert message_of(check_layout, layout(**changes)) == f"{given}: {WHY_NO_ROUTER_LOSS}"


DENSE = "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size"
EXPERT = "expert tensor x expert x pipeline parallel size"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer_ranks": 6}, f"{DENSE} is 4, which does not divide --trainer-ranks 6"),
        ({"trainer_ranks": 1}, f"{DENSE} is 4, which does not divide --trainer-ranks 1"),
        ({"trainer_ranks": 12}, f"{EXPERT} is 8, which does not divide --trainer-ranks 12"),
        (
            {"expert_tensor_parallel_size": None},
            f"{EXPERT} is 16, which does not divide --trainer-ranks 8",
        ),
        (
            {"num_attention_heads": 9},
            "--tensor-model-parallel-size is 2, which does not divide attention heads 9",
        ),
        (
            {"num_query_groups": 1},
            "--tensor-model-parallel-size is 2, which does not divide key-value heads 1",
        ),
        (
            NO_EXPERTS | {"expert_model_parallel_size": 2},
            "--expert-model-parallel-size 2: the model has no experts, leave it out",
        ),
        (
            NO_EXPERTS | {"routing_replay": "R3"},
            "--routing-replay R3: the model has no experts, leave it out",
        ),
        (
            NO_EXPERTS | {"ffn_hidden_size": 9},
            "--tensor-model-parallel-size is 2, which does not divide MLP width 9",
        ),
        ({"num_experts": 6}, "--expert-model-parallel-size is 4, which does not divide experts 6"),
        (
            {"moe_ffn_hidden_size": 5, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2},
            "--expert-tensor-parallel-size is 2, which does not divide expert width 5",
        ),
        ({"num_layers": 5}, "--pipeline-model-parallel-size is 2, which does not divide layers 5"),
        (
            {"global_batch_size": 33},
            "a mini-batch of 33 completions cannot be shared by 2 data-parallel ranks equally: change "
            "--rollout-batch-size, --group-size or --steps-per-rollout",
        ),
    ],
)
def test_a_layout_that_does_not_divide(changes, message):
    assert message_of(check_layout, layout(**changes)) == message


@pytest.mark.parametrize(
    "size", ["tensor_model", "pipeline_model", "expert_model", "expert_tensor", "context"]
)
@pytest.mark.parametrize("value", [0, -2])
def test_parallel_sizes_are_positive(size, value):
    flag = f"--{size.replace('_', '-')}-parallel-size"
    message = message_of(check_layout, layout(**{f"{size}_parallel_size": value}))
    assert message == f"{flag} is {value}, must be positive"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_distributed_optimizer_instances": 2},
            "--num-distributed-optimizer-instances 2: gradient norms by part of the model are those of one "
            "instance: leave it out",
        ),
        (
            {"on_alarm": "checkpoint-and-stop"},
            "--on-alarm checkpoint-and-stop needs --save, the folder of the checkpoint",
        ),
        ({"train_iters": None}, "--train-iters (optimizer steps) is required and must be positive"),
        ({"train_iters": 0}, "--train-iters (optimizer steps) is required and must be positive"),
        ({"train_iters": 20}, "--train-iters 20 optimizer steps must be a multiple of --steps-per-rollout 8"),
        ({"lr": None}, "--lr is required"),
        ({"lr": -1.0}, "--lr is -1, must be 0 or more, and finite"),
        ({"min_lr": -math.inf}, "--min-lr is -inf, must be 0 or more, and finite"),
        ({"clip_grad": -7.0}, "--clip-grad is -7, must be 0 or more, and finite"),
        ({"adam_beta2": 1.0}, "--adam-beta2 is 1, must be 0 or more, below 1"),
        (
            {"optimizer_cpu_offload": True},
            "--optimizer-cpu-offload moves the optimizer of a --bf16 model out of GPU memory: it needs both",
        ),
        (
            {"optimizer_cpu_offload": True, "bf16": True, "distributed_backend": "gloo"},
            "--optimizer-cpu-offload moves the optimizer of a --bf16 model out of GPU memory: it needs both",
        ),
        ({"fp16": True}, "--fp16: policy and engines share fp32 or, with --bf16, bfloat16"),
        (
            {"context_parallel_size": 4},
            "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size is 16, "
            "which does not divide --trainer-ranks 8",
        ),
        (
            {"max_tokens_per_gpu": 99},
            "--max-tokens-per-gpu 99 x --context-parallel-size 1 is less than the longest sequence, "
            "--max-prompt-tokens 40 + --max-completion-tokens 60 = 100",
        ),
        (
            {"context_parallel_size": 2, "max_tokens_per_gpu": 49, "seq_length": 99},
            "--max-tokens-per-gpu 49 x --context-parallel-size 2 is less than the longest sequence, "
            "--max-prompt-tokens 40 + --max-completion-tokens 60 = 100 with its padding",
        ),
        (
            {"routing_replay": "R2", "moe_router_fusion": True},
            "--routing-replay does not reach --moe-router-fusion, which chooses by itself: leave one out",
        ),
        (
            {"routing_replay": "R3", "num_experts": 512},
            "--routing-replay: routes are one byte, the model has 512 experts, more than 256",
        ),
        (
            {"seq_length": 101, "max_tokens_per_gpu": 200},
            "--max-prompt-tokens + --max-completion-tokens = 101, but the model has 100 positions "
            "(max_position_embeddings in its config)",
        ),
    ],
)
def test_what_megatron_needs(changes, message):
    assert message_of(check_layout, layout(**changes)) == message


@pytest.mark.parametrize(
    "argv",
    [
        "--old-policy snapshot --routing-replay R3 --max-logprob-difference 0.1",
        "--old-policy ewma --routing-replay R2 --mismatch-correction tis",
        "--old-policy snapshot --ratio-denominator decoupled --mismatch-correction reject-k3",
    ],
)
def test_old_policies_that_are_sound(flags, argv):
    check_flags(flags(*argv.split()))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--max-staleness -1", "--max-staleness -1: must not be negative"),
        ("--sync-interval 0", "--sync-interval is 0, must be positive"),
        ("--max-attempts 0", "--max-attempts is 0, must be positive"),
        (
            "--sync-interval 4",
            "--sync-interval 4: without --max-staleness weights are synced after",
        ),
        ("--max-staleness 9 --sync-interval 3", "--sync-interval 3 must be a divisor or a multiple of"),
        (
            "--max-staleness 7",
            "--steps-per-rollout 8 and --sync-interval 8 alone make samples 7 optimizer",
        ),
        ("--max-staleness 15 --sync-interval 16", "at least 16, or 0 for synchronous training"),
        (
            "--max-staleness 8 --train-from r",
            "--max-staleness 8 trains while engines generate, --train-from does one of them: leave one out",
        ),
        (
            "--max-staleness 8 --rollout-only",
            "--max-staleness 8 trains while engines generate, --rollout-only does one of them: leave one out",
        ),
        ("--over-subscription 0.5 --max-staleness 8", "--over-subscription is 0.5, a batch alone needs 1"),
        ("--over-subscription 2", "another one: it needs --max-staleness 8 at least"),
        ("--stop-generation-while-training", "another one: it needs --max-staleness 8 at least"),
        ("--max-staleness 8 --routing-replay R3", "may have routes of several policies"),
        ("--max-staleness 8 --old-policy snapshot", "needs --old-policy-snapshots 9 at least, not 4"),
    ],
)
def test_asynchronous_flags(flags, argv, message):
    assert message in message_of(check_flags, flags(*argv.split()))


@pytest.mark.parametrize(
    "argv",
    [
        "--max-staleness 8",
        "--max-staleness 8 --sync-interval 2 --on-weight-update in-place",
        "--max-staleness 16 --sync-interval 16 --stale-groups drop",
        "--max-staleness 8 --old-policy snapshot --old-policy-snapshots 9",
        "--max-staleness 8 --dynamic-sampling --over-subscription 1.5 --stop-generation-while-training",
        "--max-staleness 8 --on-weight-update abort",
        "--sync-interval 8",
    ],
)
def test_asynchronous_flags_that_go_together(flags, argv):
    check_flags(flags(*argv.split()))
