"""Counts the policy's parameters at any world size, without memory: Megatron's own model on meta tensors.

torch's fake process group stands for all ranks. So Megatron builds its groups, checks its flags and splits
layers, heads, experts and vocabulary as in the run. One rank of each pipeline stage is built, in turn.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from argparse import Namespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vespo.models.family import is_expert
from megatron_vespo.models.stage import Stage
from megatron_vespo.trainer.initialize import process_groups
from megatron_vespo.trainer.model import model_config, model_provider
from megatron_vespo.trainer.planned_machine import planned_machine
from megatron_vespo.trainer.weights import model_part

# Arguments that choose kernels but no shapes: the planning machine may lack what the flags ask for.
PLAIN = {
    "transformer_impl": "local",
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "no_persist_layer_norm": True,
    "tp_comm_overlap": False,
    "cuda_graph_impl": "none",
    "fp8": None,
    "recompute_granularity": None,
    "perform_initialization": False,  # random numbers would need memory
}


def build_stages(args: Namespace) -> list[Stage]:
    """One entry per pipeline stage. ValueError for what Megatron refuses when it builds groups or model."""
    per_stage = args.world_size // args.pipeline_model_parallel_size
    return [stage_of_rank(args, stage * per_stage) for stage in range(args.pipeline_model_parallel_size)]


def stage_of_rank(args: Namespace, rank: int) -> Stage:
    """As `build_stages`, with the part of this rank, which need not be the first of its stage."""
    assert not args.use_tp_pp_dp_mapping, "stages would not be runs of ranks"
    with planned_machine():
        return _built(args, rank)


def _built(args: Namespace, rank: int) -> Stage:
    dist.init_process_group("fake", world_size=args.world_size, rank=rank, store=FakeStore())
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            initialize_groups(args)
            model_config(args)  # for its checks of these flags
            plain = copy.copy(args)
            vars(plain).update(PLAIN)
            return _stage(plain)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"Megatron cannot build this model on {args.world_size} ranks: {reason}") from error
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def initialize_groups(args: Namespace) -> None:
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,  # they would communicate
    )


def _stage(args: Namespace) -> Stage:
    groups, provide = process_groups(), model_provider(args, model_config(args))
    stage, num_stages = groups.pp.rank(), groups.pp.size()
    virtual = args.virtual_pipeline_model_parallel_size
    chunks = []
    meta = torch.device("meta")
    with patch.object(torch.cuda, "current_device", lambda: meta), meta:
        for chunk in range(virtual or 1):
            chunks.append(
                provide(
                    pre_process=stage == 0 and chunk == 0,
                    post_process=stage == num_stages - 1 and chunk == (virtual or 1) - 1,
                    vp_stage=None if virtual is None else chunk,
                    pg_collection=groups,
                )
            )
    counts = {True: 0, False: 0}
    whole = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            experts = is_expert("." + name)
            counts[experts] += parameter.numel()
            whole += parameter.numel() * _copies(parameter, experts, name, args, groups)
    return Stage(
        part=model_part(chunks, groups),
        dense=counts[False],
        experts=counts[True],
        whole=whole,
        dense_shards=groups.dp_cp.size(),
        expert_shards=groups.expt_dp.size(),
    )


def _copies(parameter: torch.nn.Parameter, experts: bool, name: str, args: Namespace, groups) -> int:
    """How many different shards like this one the stage has; 0 for a copy of another stage's parameter."""
    if name == "output_layer.weight" and not args.untie_embeddings_and_output_weights:
        return 0
    # Megatron gives this attribute to some parameters only
    sharded = getattr(parameter, "tensor_model_parallel", False)
    if experts:
        return groups.ep.size() * (groups.expt_tp.size() if sharded else 1)
    return groups.tp.size() if sharded else 1
