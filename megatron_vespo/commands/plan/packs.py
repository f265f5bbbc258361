"""Computes bytes of a trainer rank's packs: those in flight on the GPU, a rollout batch's in host memory."""

from __future__ import annotations

import numpy as np
import torch

from megatron_vespo.arguments.rollout import RolloutSettings
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.micro_batch import build_micro_batch
from megatron_vespo.types import TOKEN_ID, TokenSupports, TrainingSample, VersionSpans

MEASURED_TOKENS = 1024
SUPPORT_SIZE = 10  # assumed: tokens that truncated sampling leaves to choose from, at most --rollout-top-k


def sample_bytes(settings: TrainSettings) -> float:
    """Bytes per token of a sample's arrays, as the trainer gets them."""
    values = vars(_sample(settings)).values()
    arrays = [value for value in values if isinstance(value, (np.ndarray, TokenSupports))]
    return sum(array.nbytes for array in arrays) / MEASURED_TOKENS


def pack_bytes(settings: TrainSettings, layers: int) -> float:
    """Bytes per token of a pack, on a rank with `layers` layers: measured on a real pack.

    Tokens are those of a context-parallel rank.
    """
    num_experts = settings.trainer.num_experts if settings.rollout.routing_replay == "R3" else None
    pack = build_micro_batch([_sample(settings)], [0], MEASURED_TOKENS, TokenLayout(), num_experts)
    # the trainer adds log-probs of pi_old and the reference, and pi_old's routes
    if settings.loss.ratio_denominator != "rollout":
        pack.old_log_probs_T = torch.zeros(MEASURED_TOKENS, dtype=torch.float64)
    if settings.loss.uses_reference:
        pack.reference_log_probs_T = torch.zeros(MEASURED_TOKENS, dtype=torch.float64)
    if settings.rollout.routing_replay == "R2":
        shape = layers, MEASURED_TOKENS // router_slices(settings), settings.trainer.moe_router_topk
        pack.old_routes[0] = torch.zeros(shape, dtype=torch.uint8)
    return pack.nbytes / MEASURED_TOKENS


def replayed_bytes(settings: TrainSettings, layers: int) -> float:
    """Bytes per token of the int64 routes that routers hold for the backward pass, per pack in flight."""
    if settings.rollout.routing_replay is None:
        return 0.0
    return layers * settings.trainer.moe_router_topk * 8 / router_slices(settings)


def router_slices(settings: TrainSettings) -> int:
    return settings.trainer.tensor_model_parallel_size if settings.trainer.sequence_parallel else 1


def _sample(settings: TrainSettings) -> TrainingSample:
    """A sample with the share of prompt tokens that the longest sample has."""
    longest = settings.rollout.max_prompt_tokens + settings.rollout.max_completion_tokens
    prompt = max(round(MEASURED_TOKENS * settings.rollout.max_prompt_tokens / longest), 1)
    completion = MEASURED_TOKENS - prompt
    routes = None
    if settings.rollout.routing_replay == "R3":
        routes = np.zeros(
            (MEASURED_TOKENS - 1, settings.trainer.num_layers, settings.trainer.moe_router_topk), np.uint8
        )
    sampling = RolloutSettings.sampling_of(settings.rollout)
    size = SUPPORT_SIZE if sampling.top_k < 1 else min(SUPPORT_SIZE, sampling.top_k)
    counts = np.full(completion, size, np.int32)
    return TrainingSample(
        token_ids=np.zeros(MEASURED_TOKENS, np.int32),
        prompt_length=prompt,
        behavior_log_probs=np.zeros(completion, np.float32),
        policy_versions=VersionSpans.single(0, completion),
        advantage=0.0,
        reward=0.0,
        temperature=1.0,
        group_id=0,
        routed_experts=routes,
        supports=TokenSupports(counts, np.zeros(counts.sum(), TOKEN_ID)) if sampling.truncates else None,
        token_advantages=np.zeros(completion, np.float32) if settings.distillation.teachers else None,
    )
