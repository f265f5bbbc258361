"""`megatron-vespo COMMAND ...`; one clear line and a non-zero exit for whatever goes wrong."""

from __future__ import annotations

import signal
import sys

USAGE = """\
usage: megatron-vespo COMMAND [flags]

commands:
  train    train an HF checkpoint with VESPO (megatron-vespo train --help)
"""
EXIT_USER_ERROR, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130


def main() -> None:
    """Console entry point."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """The exit code: 0, 2 for a mistake in flags or data, 1 for a run that broke, 130 when interrupted."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else EXIT_USER_ERROR
    command, rest = argv[0], argv[1:]
    if command != "train":
        print(f"megatron-vespo: no command {command!r}; there is: train", file=sys.stderr)
        return EXIT_USER_ERROR
    # a scheduler's SIGTERM ends a run like Ctrl-C: everything it started ends with it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from megatron_vespo.arguments import print_help

    try:
        if print_help(rest):
            return 0
        from megatron_vespo.train import main as train  # takes seconds

        train(rest)
    except ValueError as error:
        print(f"megatron-vespo: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RuntimeError as error:
        print(f"megatron-vespo: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print("megatron-vespo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    main()
