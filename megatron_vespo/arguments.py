"""Flags: ours in one group a concern, Megatron's as they are, SGLang's behind --sglang-. Validated once.

`parse_args` returns one Namespace that the driver and every worker share. A mistake is a ValueError with one
line: which flag, what it was, what would be right.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.conversion.config import megatron_arguments, read_hf_config
from megatron_vespo.rollout.server_arguments import parse_sglang_flags
from megatron_vespo.runtime import load_runtime_plugins
from megatron_vespo.validation import check_flags, check_layout

DESCRIPTION = """\
Train an HF Qwen3-MoE checkpoint with VESPO: Megatron-Core trains, SGLang generates, Ray places both.

Three families of flags:
  the groups below          this program's own
  Megatron's own flags      training, parallelism, precision, checkpoints: --help-megatron lists them all
  --sglang-<flag>           handed to every SGLang server as --<flag>, e.g. --sglang-mem-fraction-static 0.7

The model's shape comes from the HF config; a Megatron flag that contradicts it is an error.
Most used of Megatron's: --train-iters (optimizer steps), --lr, --tensor-model-parallel-size,
--pipeline-model-parallel-size, --expert-model-parallel-size, --bf16, --save, --save-interval, --load, --seed.
"""


def add_vespo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our flags, one group a concern; every default is stated here and nowhere else."""
    _add_input_arguments(parser)
    _add_rollout_arguments(parser)
    _add_algorithm_arguments(parser)
    _add_placement_arguments(parser)
    _add_output_arguments(parser)
    return parser


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--hf-checkpoint", type=Path, metavar="DIR", help="HF checkpoint to start from (required)")
    add("--prompt-data", type=Path, metavar="FILE", help="training prompts, JSONL or parquet (required)")
    add("--heldout-data", type=Path, metavar="FILE", help="prompts to evaluate on; without it none are")
    add("--prompt-key", default="question", help="column of the prompt, string or chat; dots go deeper")
    add("--answer-key", default="answer", help="column of the reference answer; dots go deeper")
    add("--answer-pattern", metavar="REGEX", help=r"the answer is its column's group 1, e.g. '####\s*(.+)'")
    add("--no-chat-template", dest="apply_chat_template", action="store_false", help="feed the text as it is")
    add("--max-prompt-tokens", type=int, default=1024)
    add("--overlong-prompts", choices=("skip", "error"), default="skip", help="skipped ones are counted")


def _add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rollout and reward")
    add = group.add_argument
    add("--rollout-batch-size", type=int, default=32, help="prompts a rollout batch")
    add("--num-completions", type=int, default=8, help="completions a prompt (the group)")
    add("--max-completion-tokens", type=int, default=1024)
    add("--rollout-temperature", type=float, default=1.0, help="the trainer's log-probs use it too")
    add("--rollout-engines", type=int, default=1, help="number of SGLang servers")
    add("--rollout-port", type=int, default=0, help="of the first server, others follow; 0: free ports")
    add("--engine-start-timeout", type=float, default=600.0, metavar="SECONDS")
    add("--generate-timeout", type=float, default=1800.0, metavar="SECONDS", help="for one completion")
    add("--reward-function", default="math", help="'math' (math-verify) or package.module:function")
    add("--reward-workers", type=int, default=1, help="processes")
    add("--reward-timeout", type=float, default=10.0, metavar="SECONDS", help="for one completion")
    add("--heldout-interval", type=int, default=5, help="evaluate every so many rollout batches")
    add("--heldout-prompts", type=int, default=512, help="how many of the held-out prompts, at most")


def _add_algorithm_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VESPO")
    add = group.add_argument
    kernel = GammaKernel()
    add("--mini-batches", type=int, default=8, help="optimizer steps a rollout batch, the paper's N")
    add("--vespo-positive", type=float, nargs=2, default=list(kernel.positive), metavar=("C1", "C2"),
        help="phi(W) = W^C1 exp(C2 (1 - W)) where the advantage is >= 0")  # fmt: skip
    add("--vespo-negative", type=float, nargs=2, default=list(kernel.negative), metavar=("C1", "C2"),
        help="the same where it is < 0")  # fmt: skip
    add("--ratio-denominator", choices=("recomputed", "rollout", "decoupled"), default="recomputed",
        help="W against: the trainer's own log-probs before the first update; the engine's; or the first, "
        "times a truncated engine ratio")  # fmt: skip
    add("--mismatch-truncation", type=float, default=2.0, help="upper bound of that engine ratio (decoupled)")
    add("--advantage-std", action="store_true", help="divide advantages by the group's standard deviation")
    add("--max-logprob-difference", type=float, help="stop where engine and trainer differ by more")


def _add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("placement and weight sync")
    add = group.add_argument
    add("--trainer-ranks", type=int, default=1, help="Megatron processes; one GPU each where there are GPUs")
    add("--max-tokens-per-gpu", type=int, default=8192, help="token budget of a packed micro-batch")
    add("--ray-address", help="Ray cluster to join, 'auto' for a running one; else a local one starts")
    add("--worker-start-timeout", type=float, default=600.0, metavar="SECONDS")
    add("--train-timeout", type=float, default=7200.0, metavar="SECONDS", help="for one rollout batch")
    add("--weight-sync-bucket-mb", type=int, default=512, metavar="MiB")
    add("--weight-sync-timeout", type=float, default=300.0, metavar="SECONDS")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", type=Path, metavar="DIR", help="metrics, logs, summary, HF export (required)")
    add("--no-hf-export", dest="hf_export", action="store_false", help="do not export the final policy")
    add("--setup-seconds", type=float, default=0.0, help="set-up time before this program, for the summary")


def parse_args(argv: list[str]) -> Namespace:
    """Everything the run needs; ValueError for a user's mistake."""
    args, _ = add_vespo_arguments(_parser()).parse_known_args(argv)
    check_flags(args)
    hf_config = read_hf_config(args.hf_checkpoint)
    sglang_flags, argv = parse_sglang_flags(argv)
    derived = _batch_arguments(args) | megatron_arguments(hf_config)

    # what is missing here says nothing about the workers' machines
    with warnings.catch_warnings(action="ignore"):
        load_runtime_plugins()
        args, explicit, flags = _parse_with_megatron(argv)
    for name, value in derived.items():
        assert name in flags, f"Megatron has no argument {name}"
        if name in explicit and explicit[name] != value:
            raise ValueError(
                f"{flags[name]} {explicit[name]} contradicts {_source(name)}, which makes it {value}"
            )
        setattr(args, name, value)
    args.sglang_flags = sglang_flags
    args.world_size = args.trainer_ranks
    check_layout(args)
    _complete(args, explicit)
    _megatron_validate(args)
    return args


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="megatron-vespo train",
        usage="megatron-vespo train --hf-checkpoint DIR --prompt-data FILE --output-dir DIR [flags]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _MegatronHelp(argparse.HelpFormatter):
    """Prints a text that is no format string as it is: some of Megatron's hold a bare %."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError):
            return action.help or ""


def print_help(argv: list[str]) -> bool:
    """Whether `argv` asks for help, which is printed then."""
    if "--help-megatron" in argv:
        with warnings.catch_warnings(action="ignore"):
            load_runtime_plugins()
            from megatron.training.arguments import add_megatron_arguments

            parser = argparse.ArgumentParser(
                usage=argparse.SUPPRESS, description="Megatron's flags", formatter_class=_MegatronHelp
            )
            add_megatron_arguments(parser)
        parser.print_help()
        return True
    if "-h" in argv or "--help" in argv:
        add_vespo_arguments(_parser()).print_help()
        return True
    return False


def _source(name: str) -> str:
    """Who decides on a derived argument."""
    sources = {
        "global_batch_size": "--rollout-batch-size x --num-completions / --mini-batches",
        "micro_batch_size": "packing to --max-tokens-per-gpu",
        "seq_length": "--max-prompt-tokens + --max-completion-tokens",
    }
    return sources.get(name, "the HF config")


def _batch_arguments(args: Namespace) -> dict[str, Any]:
    """Megatron's idea of a batch: one optimizer step is one mini-batch, counted in completions."""
    return {
        "global_batch_size": args.rollout_batch_size * args.num_completions // args.mini_batches,
        "micro_batch_size": 1,  # one pack
        "seq_length": args.max_prompt_tokens + args.max_completion_tokens,
    }


def _defaults() -> dict[str, Any]:
    """Megatron defaults that differ for reinforcement learning of an MoE; a flag of the user's wins."""
    import torch
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return {
        "distributed_backend": "nccl" if torch.cuda.is_available() else "gloo",
        "transformer_impl": "transformer_engine" if HAVE_TE else "local",
        "gradient_accumulation_fusion": HAVE_TE,
        "apply_rope_fusion": HAVE_TE,
        "no_persist_layer_norm": not HAVE_TE,
        "masked_softmax_fusion": HAVE_TE,
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": ["none"],
        "moe_aux_loss_coeff": [0.0],
        "moe_router_dtype": "fp32",
        "tokenizer_type": "NullTokenizer",
        "lr_decay_style": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "rerun_mode": "disabled",
        "save_interval": 50,
    }


def _parse_with_megatron(argv: list[str]) -> tuple[Namespace, dict[str, Any], dict[str, str]]:
    """The namespace with all defaults, the values that were really given, and the flag of every name."""
    from megatron.training.arguments import parse_args as megatron_parse_args

    explicit: dict[str, Any] = {}
    flags: dict[str, str] = {}

    def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.prog, parser.usage = "megatron-vespo train", "megatron-vespo train [flags]; see --help"
        add_vespo_arguments(parser)
        flags.update({action.dest: action.option_strings[0] for action in parser._actions})
        parser.set_defaults(**_defaults())
        defaults = {action.dest: action.default for action in parser._actions}
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        held = dict(parser._defaults)
        parser._defaults.clear()
        explicit.update(vars(parser.parse_known_args(argv)[0]))
        for action in parser._actions:
            action.default = defaults[action.dest]
        parser._defaults.update(held)
        return parser

    with patch.object(sys, "argv", ["megatron-vespo train", *argv]):
        return megatron_parse_args(extend), explicit, flags


def _complete(args: Namespace, explicit: dict[str, Any]) -> None:
    """What follows from other flags."""
    # workers on other nodes have working directories of their own
    args.hf_checkpoint = args.hf_checkpoint.resolve()
    args.save, args.load = (folder and str(Path(folder).resolve()) for folder in (args.save, args.load))
    # Megatron runs MoE with tensor parallelism only when the sequence is cut as well
    if args.tensor_model_parallel_size > 1 and "sequence_parallel" not in explicit:
        args.sequence_parallel = True
    # on --load the flags of this command count, so that a run can be made longer
    args.override_opt_param_scheduler = not args.use_checkpoint_opt_param_scheduler
    args.calculate_per_token_loss = True
    tensor = args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // tensor) * tensor
    args.gamma_kernel = GammaKernel(tuple(args.vespo_positive), tuple(args.vespo_negative))


def _megatron_validate(args: Namespace) -> None:
    from megatron.training.arguments import validate_args

    # it asserts on it for tensor parallelism; harmless without GPUs
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            validate_args(args, {})
    except (AssertionError, ValueError, RuntimeError) as error:
        # many of its assertions say nothing: then the source line does
        reason = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"Megatron refuses these flags: {reason}") from error
    # Megatron derives it from several flags; the interleaved schedule also needs micro-batches in multiples
    if args.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            "virtual pipeline stages are not supported so far: leave out the flags that ask for them"
        )
