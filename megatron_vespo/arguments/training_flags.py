"""This program's own flags, one group a concern; every default is stated here and nowhere else."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_vespo.algorithms.advantages import ADVANTAGE_ESTIMATORS
from megatron_vespo.algorithms.corrections import CORRECTIONS
from megatron_vespo.algorithms.losses.aggregation import AGGREGATIONS
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import RATIO_DENOMINATORS, GammaKernel
from megatron_vespo.arguments.async_flags import add_asynchronous_arguments
from megatron_vespo.arguments.checkpoint_flags import add_checkpoint_arguments
from megatron_vespo.arguments.checks import json_object
from megatron_vespo.arguments.engine_flags import add_engine_fault_arguments
from megatron_vespo.arguments.eval_flags import add_eval_arguments
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.time_limits import add_time_limit_arguments

DESCRIPTION = """\
Train an HF Qwen3-MoE, Qwen3 or Llama with VESPO: Megatron-Core trains, SGLang generates, Ray places both.

Three families of flags:
  the groups below          this program's own
  Megatron's own flags      training, parallelism, precision, checkpoints: --help-megatron lists them all
  --recipe FILE             more flags, of any family, from a file with # comments; the later of two wins
  --sglang-<flag>           handed to every SGLang server as --<flag>, e.g. --sglang-mem-fraction-static 0.7

The model's shape comes from the HF config; a Megatron flag that contradicts it is an error.
Most used of Megatron's: --train-iters (optimizer steps), --lr, --tensor-model-parallel-size,
--pipeline-model-parallel-size, --expert-model-parallel-size, --bf16, --save, --save-interval, --load, --seed.
"""


def add_vespo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add them all to `parser`."""
    _add_input_arguments(parser)
    _add_rollout_arguments(parser)
    add_eval_arguments(parser)
    add_asynchronous_arguments(parser)
    add_engine_fault_arguments(parser)
    _add_algorithm_arguments(parser)
    _add_placement_arguments(parser)
    add_checkpoint_arguments(parser)
    add_time_limit_arguments(parser)
    _add_output_arguments(parser)
    return parser


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--hf-checkpoint", type=user_path, metavar="DIR", help="HF checkpoint to start from (required)")
    add("--prompt-data", type=user_path, metavar="FILE", help="training prompts, JSONL or parquet (required)")
    add("--prompt-key", default="question", help="column of the prompt, string or chat; dots go deeper")
    add("--answer-key", default="answer", help="column of the reference answer; dots go deeper")
    add("--answer-pattern", metavar="REGEX", help=r"the answer is its column's group 1, e.g. '####\s*(.+)'")
    add("--no-chat-template", dest="apply_chat_template", action="store_false", help="feed the text as it is")
    add("--chat-template-arguments", type=json_object, default={}, metavar="JSON",
        help="an object, e.g. '{\"enable_thinking\": false}'")  # fmt: skip
    add("--max-prompt-tokens", type=int, default=1024)
    add("--overlong-prompts", choices=("skip", "error"), default="skip", help="skipped ones are counted")


def _add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rollout and reward")
    add = group.add_argument
    add("--rollout-batch-size", type=int, default=32, help="prompts a rollout batch")
    add("--group-size", type=int, default=8, help="completions a prompt (the group)")
    add("--max-completion-tokens", type=int, default=1024)
    add("--rollout-temperature", type=float, default=1.0, help="the trainer's log-probs use it too")
    add("--rollout-engines", type=int, default=1, help="number of SGLang servers")
    add("--rollout-port", type=int, default=0, help="of the first server, others follow; 0: free ports")
    add("--generate-function", metavar="PATH",
        help="package.module:function that makes a completion; default: a request")  # fmt: skip
    add("--reward-function", default="math", metavar="PATH",
        help="'math' or package.module:function(response, answer, metadata) -> float")  # fmt: skip
    add("--reward-workers", type=int, default=1, help="processes")
    add("--reward-memory-gb", type=float, default=4.0, metavar="GiB",
        help="for a worker and each process that it starts; inf: no limit")  # fmt: skip
    add("--overlong-buffer", type=int, default=0, metavar="TOKENS",
        help="in advantages, rewards fall over so many tokens before the limit; 0: off")  # fmt: skip
    add("--overlong-penalty", type=float, default=1.0, metavar="FACTOR", help="by so much, at most")
    add("--dynamic-sampling", action="store_true",
        help="groups of equal rewards are left out, further prompts generated")  # fmt: skip
    add("--dynamic-sampling-max-batches", type=int, default=10,
        help="at most so many times --rollout-batch-size prompts; left-out ones fill it")  # fmt: skip


def _add_algorithm_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy loss")
    add = group.add_argument
    kernel = GammaKernel()
    add("--policy-loss", choices=METHODS, default="vespo")
    add("--loss-aggregation", choices=AGGREGATIONS, help="default: " + _default_aggregations())
    add("--clip-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="ratios are clipped to 1 - LOW .. 1 + HIGH; default: " + _defaults_of("clip_range"))  # fmt: skip
    add("--dual-clip", type=float, metavar="C",
        help="where A < 0, ratios above C get no gradient, 3 in verl; default: none")  # fmt: skip
    add("--sapo-tau", type=float, nargs=2, metavar=("POSITIVE", "NEGATIVE"),
        help="of SAPO's gate, by the sign of the advantage; default: " + _defaults_of("tau"))  # fmt: skip
    add("--loss-target", type=float, metavar="VALUE",
        help="bapo: positive share of the loss to reach; m2po: mean square of log ratios not to exceed; "
        "default: " + _defaults_of("target"))  # fmt: skip
    add("--steps-per-rollout", type=int, default=8, help="optimizer steps a rollout batch, the paper's N")
    add("--vespo-positive", type=float, nargs=2, default=list(kernel.positive), metavar=("C1", "C2"),
        help="phi(W) = W^C1 exp(C2 (1 - W)) where the advantage is >= 0")  # fmt: skip
    add("--vespo-negative", type=float, nargs=2, default=list(kernel.negative), metavar=("C1", "C2"),
        help="the same where it is < 0")  # fmt: skip
    add("--vespo-budget", type=float, metavar="C",
        help="adapt C2 so that E[phi W] / E[phi] <= C, by sign; default: fixed")  # fmt: skip
    add("--ratio-denominator", choices=RATIO_DENOMINATORS, default="recomputed",
        help="W against: the trainer's log-probs before the first update; the engine's; the first, times an "
        "engine ratio truncated whole, or per token")  # fmt: skip
    add("--old-policy", choices=("current", "snapshot", "ewma"), default="current",
        help="where the trainer's policy before the first update comes from: the weights when a batch is "
        "prepared or, as asynchronous batches are older, those that generated each token, or a moving "
        "average; a resumed run begins both anew")  # fmt: skip
    add("--old-policy-snapshots", type=int, default=4, metavar="K",
        help="policy versions that snapshot keeps in CPU memory; older tokens: error")  # fmt: skip
    add("--ewma-decay", type=float, default=0.889,
        help="what a step leaves of older weights' share in the average (ewma)")  # fmt: skip
    add("--mismatch-truncation", type=float, default=2.0, help="upper bound of that engine ratio")
    add("--mismatch-correction", choices=CORRECTIONS, default="none",
        help="weight or mask by rho = pi_old / engine, a token or a response")  # fmt: skip
    add("--mismatch-bounds", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="of that correction; default: " + _defaults_of("bounds", CORRECTIONS))  # fmt: skip
    add("--routing-replay", choices=("R2", "R3"),
        help="replay expert choices: R2 pi_old's; R3 the engine's, for pi_old too")  # fmt: skip
    add("--advantage-estimator", choices=ADVANTAGE_ESTIMATORS, default="group-mean",
        help="reward minus: its group's mean; over the group's std, too; the mean of the group's others; the "
        "rollout batch's mean, over the batch's std")  # fmt: skip
    add("--max-logprob-difference", type=float, help="stop where engine and trainer differ by more")


def _add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("placement and weight sync")
    add = group.add_argument
    add("--trainer-ranks", type=int, default=1, help="Megatron processes; one GPU each where there are GPUs")
    add("--colocate", action="store_true",
        help="engines on the trainer's GPUs: both take turns and give memory back")  # fmt: skip
    add(
        "--no-colocate-offload",
        dest="colocate_offload",
        action="store_false",
        help="weights and optimizer stay on the GPU in the engines' turn",
    )
    add("--max-tokens-per-gpu", type=int, default=8192,
        help="token budget of a packed micro-batch; context parallelism multiplies it")  # fmt: skip
    add("--log-prob-chunk-size", type=int, default=1024, metavar="TOKENS",
        help="logits exist for so many tokens at a time")  # fmt: skip
    add("--ray-address", help="Ray cluster to join, 'auto' for a running one; else a local one starts")
    add("--weight-sync-bucket-mb", type=int, default=512, metavar="MiB")
    add("--weight-check-interval", type=int, default=50, metavar="SYNCS",
        help="compare an engine with an export, as on every resume; 0: only then")  # fmt: skip


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", type=user_path, metavar="DIR", help="metrics, logs, summary, HF export (required)")
    add("--no-hf-export", dest="hf_export", action="store_false", help="do not export the final policy")
    add("--on-alarm", choices=("warn", "stop", "checkpoint-and-stop"), default="warn",
        help="what an alarm does, see README: Reading a run; the last one needs --save")  # fmt: skip
    add("--save-rollouts", type=user_path, metavar="DIR", help="record every rollout batch there")
    add("--train-from", type=user_path, metavar="DIR",
        help="train on recorded batches; no engines, no --prompt-data")  # fmt: skip
    add("--rollout-only", action="store_true",
        help="generate and score with the weights of --hf-checkpoint; no trainer")  # fmt: skip
    add("--setup-seconds", type=float, default=0.0, help="set-up time before this program, for the summary")


def _default_aggregations() -> str:
    """Each loss's own, for people: those of few losses by name, the most frequent one for the others."""
    losses: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        losses.setdefault(method.aggregation, []).append(name)
    *few, most = sorted(losses, key=lambda aggregation: len(losses[aggregation]))
    return "; ".join([f"{aggregation} of {', '.join(losses[aggregation])}" for aggregation in few] + [most])


def _defaults_of(option: str, table: Mapping[str, Any] = METHODS) -> str:
    """Each entry's own value of an option, for people."""
    values = {name: getattr(entry, option) for name, entry in table.items()}
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items() if value)


def _plain(value: float | tuple[float, float]) -> str:
    return " ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))
