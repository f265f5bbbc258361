"""`megatron-vespo COMMAND ...`: runs a command; an error becomes one clear line and a non-zero exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from megatron_vespo import __version__
from megatron_vespo.commands.endings import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_USER_ERROR, ending

USAGE = """\
usage: megatron-vespo COMMAND [flags], or --version

commands:
  train           train an HF checkpoint with VESPO (megatron-vespo train --help)
  evaluate        avg@k and pass@k of a checkpoint (megatron-vespo evaluate --help)
  prepare-data    a public prompt set as JSONL, cleaned (megatron-vespo prepare-data --help)
  plan            check a run before it waits in a queue (megatron-vespo plan --help)
  check layout    compare what parallel layouts compute (megatron-vespo check layout --help)
  convert         HF <-> Megatron checkpoints, inspect, verify (megatron-vespo convert --help)
  simulate        how fast a run would be (megatron-vespo simulate --help)
  doctor          check a machine, or by srun all nodes (megatron-vespo doctor --help)
  smoke           every part of a run once, with a small model (megatron-vespo smoke --help)
  submit          a training run as a SLURM job (megatron-vespo submit --help)
  view            runs on a local web page, also while they go on (megatron-vespo view --help)
  args            the Megatron flags of an HF checkpoint's model (megatron-vespo args --help)
"""


def main() -> None:
    """Console entry point."""
    try:
        code = run(sys.argv[1:])
    except SystemExit as stop:  # argparse
        code = stop.code
    except OSError as error:  # from this module's own output: commands are guarded
        code = _unwritable(error)
    sys.exit(code or _flushed())


def _flushed() -> int:
    """Flushes stdout; the exit code if that fails, else 0."""
    try:
        if sys.stdout is not None:  # None: the parent process closed it
            sys.stdout.flush()
    except OSError as error:
        return _unwritable(error)
    return 0


def _unwritable(error: OSError) -> int:
    """Discards the rest of the output. It is no error if the reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    print(f"megatron-vespo: the output cannot be written: {error.strerror}", file=sys.stderr)
    return EXIT_FAILURE


def run(argv: list[str]) -> int:
    """The exit code: 0, 2 for a mistake in flags or data, 1 for a run that broke, 130 when interrupted.

    `preemption` defines further ones.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        print(f"megatron-vespo {__version__}")
        return 0
    for words, command in COMMANDS.items():
        if argv[: len(words.split())] == words.split():
            return _guarded(words, command, argv[len(words.split()) :])
    print(f"megatron-vespo: no command {argv[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
    return EXIT_USER_ERROR


def _guarded(name: str, command: Callable[[list[str]], int], argv: list[str]) -> int:
    """The command's exit code. If it raises, prints one line and returns the error's exit code."""
    # a scheduler's SIGTERM ends a run like Ctrl-C: everything that the run started ends too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command(argv)
    except (Exception, KeyboardInterrupt) as error:  # `ending` has a line for each
        code, line = ending(error, [name, *argv])
        if line:
            print(f"megatron-vespo: {line}", file=sys.stderr)
        return code


def _train(argv: list[str]) -> int:
    from megatron_vespo.arguments.recipe import with_recipes
    from megatron_vespo.driver.finished import finished_by_files

    argv = with_recipes(argv)
    if finished := finished_by_files(argv):
        print(finished)
        return 0
    from megatron_vespo.arguments.parse import print_help  # takes seconds

    if not print_help(argv):
        from megatron_vespo.commands.train import main as train

        train(argv)
    return 0


def _evaluate(argv: list[str]) -> int:
    from megatron_vespo.commands.evaluate.command import main as evaluate

    return evaluate(argv)


def _prepare_data(argv: list[str]) -> int:
    from megatron_vespo.commands.prepare_data.command import main as prepare_data

    return prepare_data(argv)


def _plan(argv: list[str]) -> int:
    from megatron_vespo.commands.plan.command import main as plan

    return plan(argv)


def _check_layout(argv: list[str]) -> int:
    from megatron_vespo.commands.check_layout.command import main as check
    from megatron_vespo.commands.check_layout.command import print_help

    return 0 if print_help(argv) else check(argv)


def _convert(argv: list[str]) -> int:
    from megatron_vespo.commands.convert.command import main as convert

    return convert(argv)


def _simulate(argv: list[str]) -> int:
    from megatron_vespo.commands.simulate.command import main as simulate

    return simulate(argv)


def _doctor(argv: list[str]) -> int:
    from megatron_vespo.commands.doctor.command import main as doctor

    return doctor(argv)


def _smoke(argv: list[str]) -> int:
    from megatron_vespo.commands.smoke.command import main as smoke

    return smoke(argv)


def _submit(argv: list[str]) -> int:
    from megatron_vespo.commands.submit.command import main as submit

    return submit(argv)


def _view(argv: list[str]) -> int:
    from megatron_vespo.commands.view.command import main as view

    return view(argv)


def _args(argv: list[str]) -> int:
    from megatron_vespo.commands.args import main as args

    return args(argv)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "prepare-data": _prepare_data,
    "plan": _plan,
    "check layout": _check_layout,
    "convert": _convert,
    "simulate": _simulate,
    "doctor": _doctor,
    "smoke": _smoke,
    "submit": _submit,
    "view": _view,
    "args": _args,
}


if __name__ == "__main__":
    main()
