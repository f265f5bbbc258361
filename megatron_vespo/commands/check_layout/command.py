"""`megatron-vespo check layout`: checks that parallel layouts compute the same as a reference layout."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_vespo.arguments.checks import check_folder, check_output_file, check_positive
from megatron_vespo.arguments.parse import parse_settings
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.arguments.trainer import TrainerSettings
from megatron_vespo.cluster.blocks import neighbours
from megatron_vespo.cluster.placement import has_gpus, place, start_ray, stop_ray
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.commands.check_layout.bounds import rounding_bounds
from megatron_vespo.commands.check_layout.layout import FLAGS, WORDS, Layout
from megatron_vespo.commands.check_layout.options import CheckLayoutOptions
from megatron_vespo.commands.check_layout.sample_file import random_samples, read_samples, with_noisy_behavior
from megatron_vespo.models.hf_config import megatron_arguments, read_hf_config
from megatron_vespo.observability.layout_report import (
    Differences,
    LayoutMeasurement,
    Row,
    caption,
    compare,
    markdown,
    print_table,
)
from megatron_vespo.system.disk import write_atomically
from megatron_vespo.system.hardware import runs_on_gpus
from megatron_vespo.system.paths import user_path
from megatron_vespo.types import TrainingSample

COMMAND = "check layout"
DESCRIPTION = f"""\
Runs parallel layouts on real Megatron ranks, each from the same weights and the same samples, and compares
what must not depend on the layout: log W of every sequence, loss, gradient norms, chosen experts.

A layout combines {WORDS} with commas: tp2,pp2,ep2. Sizes that are not named are 1.
dp is the exception: it is the smallest that fits the layout of the experts. vppN is N virtual pipeline
stages per rank.

Any flag of Megatron or of `megatron-vespo train` may follow; it applies to all layouts.

The default bounds are the differences that rounding can cause for this model and these samples. They grow
with the number of layers and tokens and with the size of the log-probs; commands/check_layout/bounds.py
derives them. They hold for one step: a step carries rounding into the weights, more so with a higher --lr
(default 1e-6), so --steps may need wider bounds. In bf16, rounding is 32,768 times larger and changes the
experts of near ties. Therefore prove a layout in fp32.
Exit code: 0 if all differences are within the bounds, 1 if not or if a layout failed, 2 for a mistake.
"""
BOUND_HELP = {
    "log_w": "largest difference of a sequence's log W",
    "loss": "difference of the loss, relative to the size of its terms",
    "grad_norm": "relative difference of the gradient norm",
    "parameter_norm": "the same of every parameter's",
    "experts": "share of (token, layer) pairs with other experts",
}
# standard deviation, per token, of the random part of log(pi / mu); without it W would be 1
BEHAVIOR_DEVIATION = 0.05
# without --max-tokens-per-gpu, one data-parallel rank makes about this many micro-batches
MICRO_BATCHES = 8
# the paper's learning rate; `decoupled` has both pi_old and mu in W
DEFAULT_FLAGS = ["--lr", "1e-6", "--ratio-denominator", "decoupled"]
BATCH_FLAGS = ("--train-iters", "--steps-per-rollout", "--rollout-batch-size", "--group-size")


def main(argv: list[str]) -> int:
    """The exit code, 0 or 1; ValueError for a user's mistake."""
    options, flags = _parse(argv)
    _check(options, flags)
    samples = _samples(options)
    layouts = [Layout.parse(text) for text in (options.reference, *options.candidate)]
    arguments = [_layout_arguments(layout, options, flags, samples) for layout in layouts]
    for layout in layouts:
        print(f"{layout.name}: {' '.join(layout.flags())}", flush=True)
    rows, bounds = _run(layouts, arguments, samples, options)
    text = caption(bounds, options.steps, len(samples))
    print_table(rows, text)
    if options.markdown:
        write_atomically(options.markdown, markdown(rows, text))
    return int(any(row.verdict != "ok" for row in rows[1:]))


def print_help(argv: list[str]) -> bool:
    """Prints the help if `argv` asks for it; returns whether it did."""
    wanted = "-h" in argv or "--help" in argv
    if wanted:
        _parser().print_help()
    return wanted


def _parse(argv: list[str]) -> tuple[CheckLayoutOptions, list[str]]:
    """This command's own flags, and the others."""
    args, flags = _parser().parse_known_args(argv)
    if args.hf_checkpoint is None:
        raise ValueError("--hf-checkpoint is required; see --help")
    return CheckLayoutOptions.of(args), flags


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog=f"megatron-vespo {COMMAND}",
        usage=f"megatron-vespo {COMMAND} --hf-checkpoint DIR --reference LAYOUT --candidate LAYOUT [flags]",
        description=DESCRIPTION,
        add_help=False,
    )
    add = parser.add_argument
    add(
        "--hf-checkpoint",
        type=user_path,
        metavar="DIR",
        help="HF checkpoint, the weights of all layouts (required)",
    )
    add("--reference", metavar="LAYOUT", default="tp1", help="what the others are compared with; default tp1")
    add(
        "--candidate", metavar="LAYOUT", nargs="+", action="extend", default=[], help="one or more (required)"
    )
    add("--batch", type=user_path, metavar="FILE",
        help="samples, JSONL: token_ids, prompt_length, advantage, and if wished behavior_log_probs, "
        "token_advantages, temperature, reward, group_id, segments; without it random ones")  # fmt: skip
    add("--samples", type=int, default=32, help="number of random samples; default 32")
    add("--max-prompt-tokens", type=int, default=24, help="of random samples; default 24")
    add("--max-completion-tokens", type=int, default=40, help="of random samples; default 40")
    add("--seed", type=int, default=1234, help="of random samples; default 1234")
    add("--steps", type=int, default=1, help="optimizer steps, each on all samples; default 1")
    add("--markdown", type=user_path, metavar="FILE", help="write the table there, too")
    add("--output-dir", type=user_path, metavar="DIR", help="for the ranks' logs; without it a temporary one")
    for name, text in BOUND_HELP.items():
        add(_bound_flag(name), type=float, metavar="BOUND", help=f"{text}; default: what rounding makes")
    return parser


def _bound_flag(name: str) -> str:
    return f"--max-{name.replace('_', '-')}-difference"


def _check(options: CheckLayoutOptions, flags: Sequence[str]) -> None:
    if not options.hf_checkpoint.is_dir():
        raise ValueError(f"--hf-checkpoint {options.hf_checkpoint}: no such folder")
    if not options.candidate:
        raise ValueError("--candidate is required: a layout such as tp2,pp2,ep2; see --help")
    check_positive(options, ("samples", "max_prompt_tokens", "max_completion_tokens", "steps"))
    check_output_file("--markdown", options.markdown)
    if options.output_dir:
        check_folder("--output-dir", options.output_dir, writable=True)
    given = {word.partition("=")[0] for word in flags}
    for flag in FLAGS:
        if flag in given:
            raise ValueError(f"{flag} is part of a layout: say it in --reference and --candidate; see --help")
    for flag in BATCH_FLAGS:
        if flag in given:
            raise ValueError(f"{flag}: this command makes its own batch, see --batch, --samples and --steps")


def _samples(options: CheckLayoutOptions) -> list[TrainingSample]:
    vocab_size = megatron_arguments(read_hf_config(options.hf_checkpoint))["vocab_size"]
    if options.batch:
        return read_samples(options.batch, vocab_size)
    return random_samples(
        options.samples, vocab_size, options.max_prompt_tokens, options.max_completion_tokens, options.seed
    )


def _layout_arguments(
    layout: Layout, options: CheckLayoutOptions, flags: Sequence[str], samples: Sequence[TrainingSample]
) -> TrainSettings:
    """Everything that the ranks of a layout need. Nothing is started yet, so a mistake shows at once."""
    shares = layout.dp * (layout.pp if layout.vpp > 1 else 1)
    if len(samples) % shares:
        virtual = f" x pp{layout.pp} (virtual stages need so many micro-batches)" if layout.vpp > 1 else ""
        raise ValueError(
            f"layout {layout.name!r}: {len(samples)} samples cannot be shared by dp{layout.dp}{virtual} "
            f"equally: {'--batch' if options.batch else '--samples'} needs a multiple of {shares}"
        )
    longest_prompt = max(sample.prompt_length for sample in samples)
    longest_completion = max(sample.completion_length for sample in samples)
    total = sum(sample.num_tokens for sample in samples)
    budget = max(longest_prompt + longest_completion, math.ceil(total / MICRO_BATCHES))
    common = {
        "--hf-checkpoint": options.hf_checkpoint,
        "--seed": options.seed,
        "--max-prompt-tokens": longest_prompt,
        "--max-completion-tokens": longest_completion,
        # one optimizer step is one mini-batch of all samples
        "--rollout-batch-size": 1,
        "--group-size": len(samples),
        "--steps-per-rollout": 1,
        "--train-iters": options.steps,
    }
    argv = [*DEFAULT_FLAGS, "--max-tokens-per-gpu", str(budget), *flags]
    argv += [str(word) for pair in common.items() for word in pair]
    try:
        settings = parse_settings([*argv, *layout.flags()], COMMAND, required=(), on_gpus=has_gpus)
    except ValueError as error:
        raise ValueError(f"layout {layout.name!r}: {error}") from error
    if settings.rollout.routing_replay == "R3":
        raise ValueError("--routing-replay R3 needs an engine's routes, which no sample has here; R2 works")
    return settings


def _bounds(
    options: CheckLayoutOptions, trainer: TrainerSettings, samples: Sequence[TrainingSample]
) -> Differences:
    given = {name: getattr(options, _bound_flag(name)[2:].replace("-", "_")) for name in BOUND_HELP}
    log_probs = [sample.behavior_log_probs for sample in samples]
    return dataclasses.replace(
        rounding_bounds(log_probs, trainer.num_layers, trainer.bf16),
        **{name: value for name, value in given.items() if value is not None},
    )


def _run(
    layouts: Sequence[Layout],
    settings: Sequence[TrainSettings],
    samples: list[TrainingSample],
    options: CheckLayoutOptions,
) -> tuple[list[Row], Differences]:
    """One row per layout, and the bounds. The reference must work; if another layout breaks, its error is
    printed.
    """
    folder = options.output_dir or Path(tempfile.mkdtemp(prefix="megatron-vespo-check-"))
    rows: list[Row] = []
    with ExitStack() as stack:
        stack.callback(stop_ray)
        ranks = max(of_layout.trainer.trainer_ranks for of_layout in settings)
        start_ray(settings[0].engines.ray_address, ranks)
        reference: LayoutMeasurement | None = None
        for layout, of_layout in zip(layouts, settings, strict=True):
            started = time.monotonic()
            try:
                samples, measured = _measure(of_layout, samples, options, folder / layout.name)
            except RuntimeError as error:
                if reference is None:
                    raise
                print(f"{layout.name}: {error}", file=sys.stderr, flush=True)
                rows.append(Row(layout.name, layout.world_size, time.monotonic() - started, verdict="broke"))
                continue
            seconds = time.monotonic() - started
            if reference is None:
                reference, bounds = measured, _bounds(options, of_layout.trainer, samples)
                rows.append(Row(layout.name, layout.world_size, seconds, verdict="reference"))
            else:
                differences, worst = compare(reference, measured)
                above = differences.above(bounds)
                verdict = f"above the bound: {', '.join(above)}" if above else "ok"
                rows.append(Row(layout.name, layout.world_size, seconds, differences, worst, verdict))
            print(
                f"{layout.name}: {layout.world_size} ranks, {seconds:.0f} s, {rows[-1].verdict}", flush=True
            )
    if options.output_dir is None and all(row.verdict != "broke" for row in rows):
        shutil.rmtree(folder)
    return rows, bounds


def _measure(
    settings: TrainSettings, samples: list[TrainingSample], options: CheckLayoutOptions, log_dir: Path
) -> tuple[list[TrainingSample], LayoutMeasurement]:
    """Runs one layout and waits until its processes have ended.

    Samples without behavior log-probs get them from the first layout's log-probs. The completed samples are
    returned for the other layouts.
    """
    with ExitStack() as stack:
        trainer = settings.trainer
        on_gpus = runs_on_gpus(trainer.distributed_backend)
        placement = place(trainer.trainer_ranks, neighbours(trainer), 0, 1, on_gpus)
        stack.callback(placement.release)
        for line in placement.divided:
            print(f"{trainer.trainer_ranks} ranks: {line}", file=sys.stderr, flush=True)
        group = TrainerGroup(settings, placement, log_dir.resolve(), watch=lambda: None)
        stack.callback(group.wait_until_gone)
        stack.callback(group.stop)
        group.start()
        if any(np.isnan(sample.behavior_log_probs).any() for sample in samples):
            # log-probs do not depend on behavior log-probs, but these must be numbers
            asked = [
                dataclasses.replace(sample, behavior_log_probs=np.zeros(sample.num_trained, np.float32))
                for sample in samples
            ]
            log_probs = group.log_probs(asked)
            samples = with_noisy_behavior(samples, log_probs, BEHAVIOR_DEVIATION, options.seed)
        return samples, group.measure_layout(samples, options.steps)
