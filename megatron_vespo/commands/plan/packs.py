"""Bytes of a trainer rank's packs: on the GPU those in flight, in host memory those of a rollout batch."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import torch

from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.micro_batch import build_micro_batch
from megatron_vespo.types import TrainingSample

MEASURED_TOKENS = 1024


def sample_bytes(args: Namespace) -> float:
    """Of a sample's arrays for each of its tokens, as the trainer gets them."""
    return sum(value.nbytes for value in vars(_sample(args)).values() if isinstance(value, np.ndarray)) / (
        MEASURED_TOKENS
    )


def pack_bytes(args: Namespace, layers: int) -> float:
    """Of a pack for each of its tokens, on a rank with so many layers: measured on a real one.

    Tokens are those of a context-parallel rank.
    """
    num_experts = args.num_experts if args.routing_replay == "R3" else None
    pack = build_micro_batch([_sample(args)], [0], MEASURED_TOKENS, TokenLayout(), num_experts)
    # what the trainer adds: pi_old's log-probs and routes
    if args.ratio_denominator != "rollout":
        pack.old_log_probs_T = torch.zeros(MEASURED_TOKENS, dtype=torch.float64)
    if args.routing_replay == "R2":
        shape = layers, MEASURED_TOKENS // router_slices(args), args.moe_router_topk
        pack.old_routes[0] = torch.zeros(shape, dtype=torch.uint8)
    return pack.nbytes / MEASURED_TOKENS


def replayed_bytes(args: Namespace, layers: int) -> float:
    """Of the routes that routers hold for the backward pass, for each token of a pack in flight: int64."""
    if args.routing_replay is None:
        return 0.0
    return layers * args.moe_router_topk * 8 / router_slices(args)


def router_slices(args: Namespace) -> int:
    return args.tensor_model_parallel_size if args.sequence_parallel else 1


def _sample(args: Namespace) -> TrainingSample:
    """With the share of prompt tokens that the longest one has."""
    longest = args.max_prompt_tokens + args.max_completion_tokens
    prompt = max(round(MEASURED_TOKENS * args.max_prompt_tokens / longest), 1)
    completion = MEASURED_TOKENS - prompt
    routes = None
    if args.routing_replay == "R3":
        routes = np.zeros((MEASURED_TOKENS - 1, args.num_layers, args.moe_router_topk), np.uint8)
    return TrainingSample(
        token_ids=np.zeros(MEASURED_TOKENS, np.int64),
        prompt_length=prompt,
        behavior_log_probs=np.zeros(completion, np.float32),
        policy_versions=np.zeros(completion, np.int64),
        advantage=0.0,
        reward=0.0,
        temperature=1.0,
        group_id=0,
        routed_experts=routes,
    )
