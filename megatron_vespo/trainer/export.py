"""Writes the policy as an HF checkpoint folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_vespo.checkpoints.block_fp8 import quantisation_config
from megatron_vespo.checkpoints.buckets import buckets
from megatron_vespo.checkpoints.hf_shards import finish_checkpoint, write_shards
from megatron_vespo.trainer.policy import MegatronPolicy


def export_hf(policy: MegatronPolicy, target: Path, bucket_bytes: int, fp8: bool = False) -> None:
    """Write the policy to `target`, one file per bucket. `args.hf_checkpoint` gives tokenizer and config.

    With `fp8` its linear layers are quantised, see `block_fp8`. A collective of all ranks; one rank per
    pipeline stage writes. The folder gets its name only when it is complete, and replaces an older one.
    """
    staging = target.with_name(target.name + ".incomplete")
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    size = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal size
        for name, tensor in policy.named_hf_weights(fp8):
            size += tensor.nbytes
            yield name, tensor

    stream = buckets(counted(), bucket_bytes)
    weight_map: dict[str, str] = {}
    if policy.is_sender:
        weight_map = write_shards(stream, staging, f"model-stage{policy.groups.pp.rank()}")
    else:
        for _ in stream:  # the gathers are collectives
            pass
        size = 0
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (weight_map, size))
    if dist.get_rank() == 0:
        merged = {name: file for part, _ in parts for name, file in part.items()}
        total = sum(part for _, part in parts)
        of_config = quantisation_config(policy.family.hf_tensors(policy.shape)) if fp8 else None
        finish_checkpoint(policy.args.hf_checkpoint, staging, target, merged, total, of_config)
    dist.barrier()
