"""What all ranks get when one of them fails, error after error; then they work on together."""

from __future__ import annotations

import os

import numpy as np

from megatron_vespo.checkpoints.ranks import Ranks, joined_ranks


def failing(ranks: Ranks, kind: type[Exception], on_first: bool) -> str:
    def work() -> int:
        if ranks.rank == (0 if on_first else 1):
            raise kind("broken")
        return 1

    try:
        ranks.on_first(work) if on_first else ranks.together(work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    with joined_ranks() as ranks:
        said = [
            failing(ranks, kind, first) for kind in (ValueError, OSError, KeyError) for first in (False, True)
        ]
        together = ranks.together(lambda: 10 * ranks.rank)
        first = ranks.on_first(lambda: 7 + ranks.rank)
    np.savez(os.environ["RESULT_FILE"], said=said, together=together, first=first)


if __name__ == "__main__":
    main()
