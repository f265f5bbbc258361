"""Parses the command line into one Namespace: our flags, Megatron's own, and SGLang's with --sglang-.

The driver and every worker share the Namespace of `parse_args`. A mistake is a ValueError with one line:
which flag, what it was, what would be right.
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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.arguments.asynchronous import default_on_weight_update
from megatron_vespo.arguments.checkpoint import check_checkpoints, check_megatron_saving
from megatron_vespo.arguments.distillation import sourced_path
from megatron_vespo.arguments.layout import check_layout, check_ranks_start, check_virtual_pipeline
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.arguments.placement import check_colocation
from megatron_vespo.arguments.quantization import check_quantization
from megatron_vespo.arguments.reference import check_reference_model
from megatron_vespo.arguments.resume import resolve_load
from megatron_vespo.arguments.rewards import resolved_reward_function
from megatron_vespo.arguments.rollout import check_rollout
from megatron_vespo.arguments.sbatch_options import check_words
from megatron_vespo.arguments.time_limits import collective_timeout_minutes
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.arguments.training_flags import (
    DESCRIPTION,
    REQUIRED_BY_TRAIN,
    add_vespo_arguments,
    check_flags,
)
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.models.hf_config import megatron_arguments, read_hf_config
from megatron_vespo.rollout.sampled_distribution import check_environment
from megatron_vespo.rollout.sampled_distribution import check_flags as check_sampling_flags
from megatron_vespo.rollout.server_arguments import parse_sglang_flags
from megatron_vespo.system.hardware import runs_on_gpus
from megatron_vespo.system.optional_packages import TRANSFORMER_ENGINE, check_transformer_engine, import_error
from megatron_vespo.system.paths import expanded_flags, names_a_path, user_path
from megatron_vespo.system.plugins import prepare_for_megatron
from megatron_vespo.system.process_environment import exported_values, trainer_environment


def parse_args(
    argv: list[str],
    command: str = "train",
    required: Sequence[str] = REQUIRED_BY_TRAIN,
    on_gpus: Callable[[str | None], bool] | None = None,
) -> Namespace:
    """All arguments of a run; ValueError for a user's mistake. `required` are names of our own flags.

    `on_gpus` gets --ray-address and returns whether the run's nodes have GPUs; without it, this machine is
    checked. The answer decides the default of --distributed-backend.
    """
    _refuse_dashes(argv)
    check_words(argv)
    argv = with_expanded_paths(argv)
    args, _ = add_vespo_arguments(_parser(command)).parse_known_args(argv)
    check_environment(os.environ)
    check_flags(args, required)
    check_checkpoints(args)
    hf_config = read_hf_config(args.hf_checkpoint)
    check_reference_model(args, hf_config)
    sglang_flags, argv = parse_sglang_flags(argv)
    check_sampling_flags(sglang_flags)
    derived = _batch_arguments(args) | megatron_arguments(hf_config)

    # what is missing here may exist on the workers' machines
    with warnings.catch_warnings(action="ignore"):
        prepare_for_megatron()
        has_gpus = on_gpus(args.ray_address) if on_gpus else _has_cuda()
        backend = "nccl" if has_gpus else "gloo"
        args, explicit, flags = _parse_with_megatron(argv, command, backend)
    for name, value in derived.items():
        assert name in flags, f"Megatron has no argument {name}"
        if name in explicit and explicit[name] != value:
            raise ValueError(
                f"{flags[name]} {explicit[name]} contradicts {_source(name)}, which makes it {value}"
            )
        setattr(args, name, value)
    # plan and submit name it, because they may run on other machines; trainer ranks check their own
    if runs_on_gpus(args.distributed_backend) and "transformer_impl" not in explicit:
        check_transformer_engine(args.transformer_impl, "this machine")
    args.sglang_flags = sglang_flags
    check_rollout(args)
    args.world_size = args.trainer_ranks
    resolve_load(args, explicit)
    check_quantization(args, hf_config)
    check_layout(args)
    check_colocation(args)
    check_megatron_saving(args)
    check_ranks_start(args)
    _check_local_layers(args)
    _complete(args, explicit)
    _megatron_validate(args)
    return args


def parse_settings(
    argv: list[str],
    command: str = "train",
    required: Sequence[str] = REQUIRED_BY_TRAIN,
    on_gpus: Callable[[str | None], bool] | None = None,
) -> TrainSettings:
    """`parse_args` as the settings dataclass that the rest of the package uses."""
    return TrainSettings.of(parse_args(argv, command, required, on_gpus))


def _parser(command: str) -> argparse.ArgumentParser:
    return FlagParser(
        prog=f"megatron-vespo {command}",
        usage="megatron-vespo train --hf-checkpoint DIR --prompt-data FILE --output-dir DIR [flags]",
        description=DESCRIPTION,
        # as wide as the usage line, which keeps the page readable
        formatter_class=partial(_OwnHelp, width=110, max_help_position=36),
    )


class _OwnHelp(argparse.RawDescriptionHelpFormatter):
    """Shows numbers as N, so that most flags fit on a line with their help.

    A group with a description shows it alone; docs/reference/flags.md has its flags.
    """

    _is_brief = False

    def start_section(self, heading: str | None) -> None:
        self._is_brief = False
        super().start_section(heading)

    def add_text(self, text: str | None) -> None:
        self._is_brief = text is not None
        super().add_text(text)

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        if not self._is_brief:
            super().add_arguments(actions)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type in (int, float) else super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        """The help with its default, unless the text has it already."""
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS) or isinstance(default, bool | dict) or "default: " in text:
            return text
        shown = " ".join(f"{value:g}" for value in default) if isinstance(default, list) else default
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        return f"{text}; default: {shown}".replace("%", "%%")


class _MegatronHelp(argparse.HelpFormatter):
    """Prints help that is no format string unchanged: some of Megatron's has a bare %."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError):
            return action.help or ""


def refuse_unknown(argv: list[str], command: str) -> None:
    """Ends the program for an unknown flag or a value of the wrong type; needs no model."""
    _refuse_dashes(argv)
    check_words(argv)
    parser = full_parser(command)
    parser.usage = f"megatron-vespo {command} [flags]; see --help"
    parser.parse_args(parse_sglang_flags(argv)[1])


def _refuse_dashes(argv: list[str]) -> None:
    if "--" in argv:  # argparse would not parse the following words as flags
        after = " ".join(argv[argv.index("--") :][:2])
        raise ValueError(f"{after}: there are only flags here, leave it out")


def full_parser(command: str = "train") -> argparse.ArgumentParser:
    """Megatron's flags and ours, each with its original default."""
    parser = _parser(command)
    with warnings.catch_warnings(action="ignore"):
        prepare_for_megatron()
        from megatron.training.arguments import add_megatron_arguments

        add_megatron_arguments(parser)
    return add_vespo_arguments(parser)


def print_help(argv: list[str]) -> bool:
    """Prints the help if `argv` asks for it; returns whether it did."""
    if "--help-megatron" in argv:
        with warnings.catch_warnings(action="ignore"):
            prepare_for_megatron()
            from megatron.training.arguments import add_megatron_arguments

            parser = argparse.ArgumentParser(
                usage=argparse.SUPPRESS, description="Megatron's flags", formatter_class=_MegatronHelp
            )
            add_megatron_arguments(parser)
        parser.print_help()
        return True
    if "-h" in argv or "--help" in argv:
        add_vespo_arguments(_parser("train")).print_help()
        return True
    return False


def with_expanded_paths(argv: list[str]) -> list[str]:
    """Flags of train with their paths expanded on this machine. ValueError for a path that cannot be."""
    own = add_vespo_arguments(_parser("train"))._actions
    ours = {flag for action in own if action.type is user_path for flag in action.option_strings}
    sourced = {flag for action in own if action.type is sourced_path for flag in action.option_strings}
    return expanded_flags(
        argv, lambda flag: flag in ours or names_a_path(flag), dict.fromkeys(sourced, sourced_path)
    )


def _source(name: str) -> str:
    """What a derived argument is derived from."""
    sources = {
        "global_batch_size": "--rollout-batch-size x --group-size / --steps-per-rollout",
        "micro_batch_size": "packing to --max-tokens-per-gpu",
        "seq_length": "--max-prompt-tokens + --max-completion-tokens",
    }
    return sources.get(name, "the HF config")


def _batch_arguments(args: Namespace) -> dict[str, Any]:
    """Megatron's batch arguments: one optimizer step is one mini-batch, counted in completions."""
    return {
        "global_batch_size": args.rollout_batch_size * args.group_size // args.steps_per_rollout,
        "micro_batch_size": 1,  # one pack
        "seq_length": args.max_prompt_tokens + args.max_completion_tokens,
    }


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _defaults(explicit: dict[str, Any], backend: str) -> dict[str, Any]:
    """Defaults that differ from Megatron's, for RL of an MoE; the user's flags override them.

    `explicit` are the user's flags: backend and transformer implementation decide which kernels exist.
    """
    backend = explicit.get("distributed_backend", backend)
    has_te = backend == "nccl" or import_error(TRANSFORMER_ENGINE) is None
    impl = explicit.get("transformer_impl", "transformer_engine" if has_te else "local")
    te = impl == "transformer_engine"
    return {
        "distributed_backend": backend,
        "transformer_impl": impl,
        "gradient_accumulation_fusion": te,
        "apply_rope_fusion": te,
        "no_persist_layer_norm": not te,
        "masked_softmax_fusion": te,
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        # --moe-router-fusion stays off: a fused router cannot replay experts, as --routing-replay requires
        "moe_permute_fusion": te,
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


def _parse_with_megatron(
    argv: list[str], command: str, backend: str
) -> tuple[Namespace, dict[str, Any], dict[str, str]]:
    """The namespace with all defaults, the values given explicitly, and the flag of every name."""
    from megatron.training.arguments import parse_args as megatron_parse_args

    explicit: dict[str, Any] = {}
    flags: dict[str, str] = {}

    def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.prog = f"megatron-vespo {command}"
        parser.usage = f"{parser.prog} [flags]; see --help"
        FlagParser.adopt(parser)
        add_vespo_arguments(parser)
        flags.update({action.dest: action.option_strings[0] for action in parser._actions})
        defaults = {action.dest: action.default for action in parser._actions}
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        held = dict(parser._defaults)
        parser._defaults.clear()
        explicit.update(vars(parser.parse_known_args(argv)[0]))
        for action in parser._actions:
            action.default = defaults[action.dest]
        parser._defaults.update(held)
        parser.set_defaults(**_defaults(explicit, backend))
        return parser

    with patch.object(sys, "argv", [f"megatron-vespo {command}", *argv]):
        return megatron_parse_args(extend), explicit, flags


def _check_local_layers(args: Namespace) -> None:
    """Refuses what Megatron 0.19.2 does only with Transformer Engine: without it the first step fails."""
    if args.transformer_impl != "local":
        return
    if args.fp32_residual_connection and args.bf16:
        raise ValueError(
            "--fp32-residual-connection needs Transformer Engine, --transformer-impl is local: leave it out"
        )
    wrong = sorted({"layernorm", "moe_act"} & set(args.recompute_modules or ()))
    if wrong and args.recompute_granularity == "selective":
        raise ValueError(
            f"--recompute-modules {' '.join(wrong)} needs Transformer Engine, --transformer-impl is local: "
            "leave it out (core_attn, moe and mlp need none)"
        )


def _complete(args: Namespace, explicit: dict[str, Any]) -> None:
    """Fills in arguments that follow from other flags."""
    # workers on other nodes have other working directories
    args.hf_checkpoint = args.hf_checkpoint.resolve()
    args.reference_checkpoint = args.reference_checkpoint and args.reference_checkpoint.resolve()
    # Megatron runs MoE with tensor parallelism only if the sequence is split as well
    if args.tensor_model_parallel_size > 1 and "sequence_parallel" not in explicit:
        args.sequence_parallel = True
    # nominal, because packs vary in length; Megatron requires it to be divisible like every sequence in them
    args.seq_length = TokenLayout(args.context_parallel_size).padded_length(args.seq_length)
    args.moe_enable_routing_replay |= args.routing_replay is not None
    # with --load this command's flags override the checkpoint's, so that a run can be extended
    args.override_opt_param_scheduler = not args.use_checkpoint_opt_param_scheduler
    args.calculate_per_token_loss = True
    args.distributed_timeout_minutes = collective_timeout_minutes(
        args, explicit.get("distributed_timeout_minutes")
    )
    tensor = args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // tensor) * tensor
    args.reward_function = resolved_reward_function(args)
    args.on_weight_update = args.on_weight_update or default_on_weight_update(args)
    args.loss_aggregation = args.loss_aggregation or METHODS[args.policy_loss].aggregation


def _megatron_validate(args: Namespace) -> None:
    from megatron.training.arguments import validate_args

    from megatron_vespo.trainer.planned_machine import planned_machine

    # validate_args asserts on environment variables that trainer ranks will have
    of_ranks = trainer_environment(exported_values(os.environ))
    variables = {name: value for name, value in of_ranks.items() if value is not None}
    background = args.async_save
    # a head node or a laptop may lack the run's GPUs
    machine = planned_machine() if runs_on_gpus(args.distributed_backend) else contextlib.nullcontext()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
            patch.dict(os.environ, variables),
            machine,
        ):
            validate_args(args, {})
    except (AssertionError, ValueError, RuntimeError) as error:
        # many of its assertions have no message: then the source line is shown
        reason = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"Megatron refuses these flags: {reason}") from error
    args.async_save = background  # validate_args knows only Megatron's own background saving
    check_virtual_pipeline(args)
