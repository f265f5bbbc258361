"""The same as `megatron-vespo plan` says it, without the ranks."""

from __future__ import annotations

import sys

from common import FLAGS, hand_back

from megatron_vespo.commands.plan.command import parsed
from megatron_vespo.commands.plan.plan import memory_of


def main() -> None:
    args, stages = parsed([*FLAGS, *sys.argv[1:]])
    memory = memory_of(args, stages)
    names = ("weights", "gradients", "optimizer")
    hand_back(**{name: [getattr(stage, name) for stage in memory] for name in names})


if __name__ == "__main__":
    main()
