"""`megatron-vespo simulate`: estimates how fast a run would be, without its machines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from megatron_vespo.arguments.asynchronous import add_asynchronous_arguments, check_staleness
from megatron_vespo.arguments.checks import check_output_file, check_positive
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.commands.simulate.calibration import Measured, measure
from megatron_vespo.commands.simulate.lengths import Lengths, LogNormal, Recorded
from megatron_vespo.commands.simulate.options import SimulateOptions
from megatron_vespo.commands.simulate.rates import PRESETS, Cost, Rates, SharedCores
from megatron_vespo.commands.simulate.report import Row, check_picture_name, format_table, plot
from megatron_vespo.commands.simulate.run import Settings, simulate
from megatron_vespo.data.rollout_file import recorded_lengths
from megatron_vespo.system.paths import user_path

SCALE = {"rollout_batches": 20, "rollout_batch_size": 512, "group_size": 8, "steps_per_rollout": 4}
_DESCRIPTION = """\
Simulate synchronous and asynchronous runs: throughput, idle shares and staleness, in seconds.

The controller's own buffer decides what is generated and trained on; what takes time is modelled: training
by tokens, engines that share their speed among running requests, weight syncs, checkpoints, failures.
"""


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    measured = None if args.from_run is None else measure(args.from_run, args.lengths_from)
    scale: dict[str, Any] = {
        name: value for name, value in _scale(measured).items() if getattr(args, name) is None
    }
    options = SimulateOptions.of(args, **scale)
    _check(options)
    if options.picture is not None:
        check_picture_name("--picture", options.picture)
        check_output_file("--picture", options.picture)
    lengths = _lengths(options, measured)
    rows = []
    for where, gpus, trainer, engines, rates in _machines(options, measured):
        for bound in _bounds(options):
            settings = _settings(options, engines, bound)
            rows.append(Row(where, gpus, trainer, bound, simulate(settings, rates, lengths)))
    print(format_table(rows))
    for row in rows:
        if measured is not None and row.max_staleness == 0:
            print(
                f"{options.from_run} took {measured.seconds:,.1f} s for {measured.num_batches} rollout "
                f"batches; simulated: {row.result.seconds:,.1f} s for {options.rollout_batches}"
            )
    if options.picture is not None:
        plot(rows, options.picture, _title(options))
        print(f"picture: {options.picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="megatron-vespo simulate",
        description=_DESCRIPTION,
    )
    _add_run_flags(parser)
    _add_length_flags(parser)
    _add_rate_flags(parser)
    _add_failure_flags(parser)
    parser.add_argument("--picture", type=user_path, metavar="PNG", help="draw the results there")
    parser.add_argument(
        "--seed", type=int, metavar="N", default=1, help="the same one gives the same (default: 1)"
    )
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run, as megatron-vespo train names it")
    add = group.add_argument
    training = argparse.ArgumentParser()
    add_asynchronous_arguments(training)
    default = training.get_default
    add("--gpus", type=int, nargs="+", default=[64], metavar="N", help="simulate each (default: 64)")
    add("--trainer-share", type=float, nargs="+", default=[0.25], metavar="F",
        help="of the GPUs, engines have the rest; simulate each (default: 0.25)")  # fmt: skip
    add("--max-staleness", type=int, nargs="+", metavar="S",
        help="simulate each; 0: synchronous; default: 0, N, 2N - 1, 2N, 4N of "
        "--steps-per-rollout N")  # fmt: skip
    add("--sync-interval", type=int, metavar="K", help="default: --steps-per-rollout")
    for name, value in SCALE.items():
        add(f"--{name.replace('_', '-')}", type=int, metavar="N",
            help=f"default: {value}, or what --from-run had")  # fmt: skip
    add("--on-weight-update", choices=("retract", "in-place", "abort"), default="retract",
        help="abort: requests come back and go on elsewhere (default: %(default)s)")  # fmt: skip
    add("--stale-groups", choices=("requeue", "drop"), default=default("stale_groups"))
    add("--over-subscription", type=float, metavar="FACTOR", help="default: all that the bound allows")
    add("--max-attempts", type=int, metavar="N", default=default("max_attempts"))
    add("--save-interval", type=int, metavar="STEPS", help="default: no checkpoints")
    add("--eval-prompts", type=int, metavar="N", default=0, help="default: no evaluation")
    add("--eval-interval", type=int, metavar="N", default=5, help="rollout batches (default: 5)")


def _add_length_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("lengths in tokens")
    add = group.add_argument
    add("--lengths-from", type=user_path, metavar="DIR", help="a folder that --save-rollouts has written")
    add(
        "--length-mean",
        type=float,
        metavar="X",
        default=3200.0,
        help="of log-normal responses (default: 3200)",
    )
    add(
        "--length-sigma",
        type=float,
        metavar="X",
        default=0.8,
        help="of the length's logarithm (default: 0.8)",
    )
    add("--length-prompt-share", type=float, default=0.3, metavar="F",
        help="of its variance is the prompt's (default: 0.3)")  # fmt: skip
    add("--max-completion-tokens", type=int, metavar="N", default=16384, help="default: 16384")
    add("--prompt-tokens", type=int, metavar="N", default=512, help="default: 512")


def _add_rate_flags(parser: argparse.ArgumentParser) -> None:
    preset = PRESETS["h100"]()
    group = parser.add_argument_group(
        "how fast things are", f"Flags win over --from-run, and that over --preset. h100 is {preset.source}."
    )
    add = group.add_argument
    add("--preset", choices=PRESETS, default="h100", help="default: h100")
    add("--from-run", type=user_path, metavar="DIR",
        help="--output-dir of a synchronous run with --save-rollouts: its rates, lengths, size")  # fmt: skip
    add("--gpus-per-engine", type=int, metavar="N", help=f"h100: {preset.gpus_per_engine}")
    add("--train-rate", type=float, metavar="X", help=f"tokens/s of a GPU; h100: {preset.train:,.0f}")
    add("--log-prob-rate", type=float, metavar="X", help=f"the same; h100: {preset.log_probs:,.0f}")
    add("--decode-ms", type=float, nargs=2, metavar=("A", "B"),
        help="a token of each of r running requests takes A + B r; h100: "
        f"{1e3 * preset.decode.fixed:.3g} {1e3 * preset.decode.each:.3g}")  # fmt: skip
    add("--prefill-rate", type=float, metavar="X", help=f"tokens/s of an engine; h100: {preset.prefill:,.0f}")
    add("--max-running", type=int, metavar="N", help=f"requests of an engine; h100: {preset.max_running}")
    add("--sync-seconds", type=float, metavar="X", help=f"a weight sync; h100: {preset.sync:g}")
    add("--save-seconds", type=float, metavar="X", help=f"a checkpoint; h100: {preset.save:.3g}")
    add("--reward-seconds", type=float, metavar="X", help="a response; h100: 0")
    add("--shared-cores", type=float, nargs=3, metavar=("C", "T", "E"),
        help="trainer and engines share C cores; alone the trainer keeps T busy, an engine E")  # fmt: skip


def _add_failure_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what goes wrong")
    add = group.add_argument
    add("--failures-per-hour", type=float, default=0.0, metavar="X", help="of one engine (default: 0)")
    add("--recovery-seconds", type=float, default=120.0, metavar="X", help="until it is back (default: 120)")
    add("--lost-requests", type=float, default=0.0, metavar="F", help="share of them (default: 0)")


def _bounds(options: SimulateOptions) -> Sequence[int]:
    n = options.steps_per_rollout
    return options.max_staleness or sorted(
        {0, *(max(bound, options.sync_interval or n) for bound in (n, 2 * n - 1, 2 * n, 4 * n))}
    )


def _scale(measured: Measured | None) -> dict[str, int]:
    """Defaults of the flags in SCALE."""
    if measured is None:
        return SCALE
    num_groups, num_completions = measured.lengths.completions.shape
    size = num_groups // measured.num_batches
    return dict(
        zip(SCALE, (measured.num_batches, size, num_completions, measured.steps_per_rollout), strict=True)
    )


def _check(options: SimulateOptions) -> None:
    positive = ("gpus", "steps_per_rollout", "rollout_batch_size", "group_size", "rollout_batches",
                "eval_interval", "length_mean", "max_completion_tokens", "save_interval",
                "gpus_per_engine", "train_rate", "log_prob_rate", "prefill_rate", "max_running",
                "shared_cores")  # fmt: skip
    other = ("max_staleness", "eval_prompts", "length_sigma", "prompt_tokens", "decode_ms", "sync_seconds",
             "save_seconds", "reward_seconds", "failures_per_hour", "recovery_seconds")  # fmt: skip
    for name in (*positive, *other):
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else [value]:
            if number is not None and not (0 <= number < 1e12 and (number or name in other)):
                what = "positive" if name in positive else "zero or more"
                raise ValueError(f"--{name.replace('_', '-')} {number}: must be {what}")
    if options.rollout_batch_size % options.steps_per_rollout:
        raise ValueError(
            f"--rollout-batch-size {options.rollout_batch_size} must be a multiple of --steps-per-rollout "
            f"{options.steps_per_rollout}"
        )
    for name, most in {"trainer_share": 1.0, "length_prompt_share": 1.0, "lost_requests": 0.5}.items():
        value = getattr(options, name)
        for share in value if isinstance(value, tuple) else [value]:
            if not 0 <= share <= most:
                raise ValueError(f"--{name.replace('_', '-')} {share}: must be 0 to {most:g}")
    if options.decode_ms and not sum(options.decode_ms):
        raise ValueError("--decode-ms 0 0: decoding takes time")
    check_positive(options, ("sync_interval", "max_attempts"))
    for bound in _bounds(options):
        # a synchronous run does not use these flags
        ahead = (options.sync_interval, options.over_subscription) if bound else (None, None)
        check_staleness(bound, options.steps_per_rollout, *ahead)


def _lengths(options: SimulateOptions, measured: Measured | None) -> Lengths:
    if measured is not None:
        return measured.lengths
    if options.lengths_from is not None:
        return Recorded(*recorded_lengths(options.lengths_from))
    return LogNormal(
        options.length_mean,
        options.length_sigma,
        options.max_completion_tokens,
        options.prompt_tokens,
        options.length_prompt_share,
    )


def _machines(
    options: SimulateOptions, measured: Measured | None
) -> Iterator[tuple[str, int, int, int, Rates]]:
    """For each machine: name, number of GPUs, trainer's GPUs, number of engines, rates."""
    if measured is not None:
        if measured.rates is None:
            raise ValueError(
                f"--from-run {options.from_run}: an asynchronous run does not say what each side takes "
                "alone; take a synchronous one"
            )
        ranks, engines = measured.trainer_ranks, measured.num_engines
        yield (
            "that run",
            ranks + engines,
            ranks,
            engines,
            _override(options, measured.rates, ranks),
        )
        return
    preset = PRESETS[options.preset]()
    size = options.gpus_per_engine or preset.gpus_per_engine
    for gpus, share in product(options.gpus, options.trainer_share):
        engines = max((gpus - max(round(gpus * share), 1)) // size, 1)
        trainer = gpus - engines * size
        if trainer < 1:
            raise ValueError(f"--gpus {gpus}: an engine takes {size} of them and the trainer needs one")
        where = f"{gpus} GPUs" if len(options.trainer_share) == 1 else f"{gpus} GPUs, {trainer} train"
        yield where, gpus, trainer, engines, _override(options, preset.rates(trainer), trainer)


def _override(options: SimulateOptions, rates: Rates, trainer: int) -> Rates:
    """`rates`, with the given flags in place of its values."""
    engine = rates.engine
    if options.decode_ms:
        engine = replace(engine, decode=Cost(*(ms / 1e3 for ms in options.decode_ms)))
    if options.prefill_rate:
        engine = replace(engine, prefill=options.prefill_rate)
    if options.max_running:
        engine = replace(engine, max_running=options.max_running)
    changes: dict[str, object] = {"engine": engine}
    for name, rate in {"train": options.train_rate, "log_probs": options.log_prob_rate}.items():
        if rate:
            changes[name] = Cost(each=1 / (rate * trainer))
    for name, seconds in {"sync": options.sync_seconds, "save": options.save_seconds}.items():
        if seconds is not None:
            changes[name] = Cost(seconds)
    if options.reward_seconds is not None:
        changes["reward"] = Cost(each=options.reward_seconds)
    if options.shared_cores:
        changes["shared"] = SharedCores(*options.shared_cores)
    return replace(rates, **changes)


def _settings(options: SimulateOptions, engines: int, bound: int) -> Settings:
    return Settings(
        train_steps=options.rollout_batches * options.steps_per_rollout,
        steps_per_rollout=options.steps_per_rollout,
        rollout_batch_size=options.rollout_batch_size,
        group_size=options.group_size,
        num_engines=engines,
        max_staleness=bound,
        sync_interval=options.sync_interval if bound else None,
        on_weight_update=options.on_weight_update,
        requeue=options.stale_groups == "requeue",
        max_attempts=options.max_attempts,
        over_subscription=options.over_subscription if bound else None,
        save_interval=options.save_interval,
        eval_prompts=options.eval_prompts,
        eval_interval=options.eval_interval,
        failures_per_hour=options.failures_per_hour,
        recovery_seconds=options.recovery_seconds,
        lost_share=options.lost_requests,
        seed=options.seed,
    )


def _title(options: SimulateOptions) -> str:
    source = f"rates of {options.from_run.name}" if options.from_run else options.preset
    return (
        f"{options.rollout_batch_size} prompts x {options.group_size} a rollout batch, "
        f"{options.steps_per_rollout} optimizer steps each ({source})"
    )
