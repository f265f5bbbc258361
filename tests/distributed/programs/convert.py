"""`megatron-vespo convert ARGUMENTS` on every rank: the exit code and what went to stderr."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr

import numpy as np

from megatron_vespo.commands import main as cli


def main(arguments: list[str]) -> None:
    with redirect_stderr(io.StringIO()) as err:
        code = cli.run(["convert", *arguments, "--quiet"])
    np.savez(os.environ["RESULT_FILE"], code=code, err=err.getvalue())


if __name__ == "__main__":
    main(sys.argv[1:])
