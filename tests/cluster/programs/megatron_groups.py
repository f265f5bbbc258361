"""Megatron's own groups of ranks for a run, built by its own code over torch's fake process group."""

from __future__ import annotations

from argparse import Namespace

import torch.distributed as dist

KINDS = ("tensor", "context", "expert", "expert_tensor")
Groups = dict[str, list[list[int]]]  # by kind, every group of more than one rank


def parsed(flags: list[str], command: str = "plan") -> tuple[Namespace, Groups]:
    """The run's arguments, as on a machine with GPUs, and its groups."""
    from megatron_vespo.arguments.parse import parse_args
    from megatron_vespo.system.hardware import ON_GPUS

    args = parse_args([*ON_GPUS, *flags], command, ("hf_checkpoint",))
    # it is pickled: functions and enumerations of Megatron's would be imported by whoever reads it
    names = ("trainer_ranks", "rollout_engines", "colocate", "sglang_flags", *_SIZES)
    return Namespace(**{name: getattr(args, name) for name in names}), groups_of(args)


_SIZES = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "pipeline_model_parallel_size",
)


def groups_of(args: Namespace) -> Groups:
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_vespo.trainer.initialize import process_groups
    from megatron_vespo.trainer.meta_model import initialize_groups

    found: dict[str, set[tuple[int, ...]]] = {kind: set() for kind in KINDS}
    for rank in range(args.trainer_ranks):
        dist.init_process_group("fake", world_size=args.trainer_ranks, rank=rank, store=FakeStore())
        try:
            initialize_groups(args)
            groups = process_groups()
            mine = dict(tensor=groups.tp, context=groups.cp, expert=groups.ep, expert_tensor=groups.expt_tp)
            for kind, group in mine.items():
                found[kind].add(tuple(dist.get_process_group_ranks(group)))
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return {kind: sorted(list(ranks) for ranks in groups if len(ranks) > 1) for kind, groups in found.items()}
