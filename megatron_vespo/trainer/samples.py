"""Refuses samples whose numbers would make the loss NaN or never reach it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import numpy as np

from megatron_vespo.data.micro_batch import OPTIONAL_COLUMNS
from megatron_vespo.data.routes import repeats_expert
from megatron_vespo.data.shards import check_length
from megatron_vespo.data.supports import check_supports
from megatron_vespo.types import TrainingSample, fetched


def check_sample(sample: TrainingSample, name: str, args: Namespace, needs_routes: bool) -> None:
    """ValueError, with the sample and its group, if the sample cannot be trained on.

    It is refused if it is too long, has missing or non-finite numbers, unknown tokens or impossible
    supports. With `needs_routes` it is also refused if its routes are missing, or have another shape or
    policy version than the tokens, unless the sample says that it has no routes.
    """
    where = f"{name} (group {sample.group_id})"
    check_length(sample, where, args.max_tokens_per_gpu * args.context_parallel_size)
    for column in ("behavior_log_probs", *OPTIONAL_COLUMNS):
        if (values := getattr(sample, column)) is not None:
            _check_column(sample, where, column, values)
    if not np.isfinite(sample.advantage):
        raise ValueError(f"{where} has the advantage {sample.advantage}, it must be finite")
    if not sample.temperature > 0:
        raise ValueError(f"{where} was sampled at temperature {sample.temperature}, it must be positive")
    if sample.token_ids.min() < 0 or sample.token_ids.max() >= args.vocab_size:
        raise ValueError(
            f"{where} has token ids from {sample.token_ids.min()} to {sample.token_ids.max()}, the "
            f"vocabulary has 0 to {args.vocab_size - 1}"
        )
    check_supports(sample, args.vocab_size, where)
    if needs_routes and sample.replays:
        _check_routes(sample, where, args)


def with_routes(sample: TrainingSample) -> TrainingSample:
    """Return the sample with its routes in this process, if it has any."""
    if sample.routed_experts is None or isinstance(sample.routed_experts, np.ndarray):
        return sample
    return replace(sample, routed_experts=fetched(sample.routed_experts))


def _check_column(sample: TrainingSample, where: str, name: str, values: np.ndarray) -> None:
    if len(values) != sample.num_trained:
        raise ValueError(f"{where} has {len(values)} {name} for {sample.num_trained} sampled tokens")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{where} has {len(bad)} non-finite {name}, the first one is {values[bad[0]]} at sampled "
            f"token {bad[0]}"
        )


def _check_routes(sample: TrainingSample, where: str, args: Namespace) -> None:
    if sample.routed_experts is None:
        raise ValueError(f"{where} has no routed_experts, --routing-replay R3 needs the engine's")
    routes = fetched(sample.routed_experts)
    expected = (sample.num_tokens - 1, args.num_layers, args.moe_router_topk)
    if routes.dtype != np.uint8 or routes.shape != expected:
        raise ValueError(
            f"{where} has routed_experts {routes.dtype} {list(routes.shape)}, expected uint8 "
            f"{list(expected)}: tokens but the last, layers, experts per token"
        )
    if routes.max() >= args.num_experts:
        raise ValueError(f"{where} was routed to expert {routes.max()}, there are {args.num_experts}")
    # a repeated expert would be counted once and leave a share of the token unrouted; engines fill the layers
    # that have no experts, which come first, with zeros
    with_experts = args.moe_layer_freq
    first = with_experts.count(0) if isinstance(with_experts, list) else 0
    if repeats_expert(routes[:, first:]):
        raise ValueError(f"{where} has a token with the same expert twice in its routed_experts")
    if sample.routes_version != sample.policy_versions.last:
        raise ValueError(
            f"{where} has routes of policy version {sample.routes_version}, its last token is of version "
            f"{sample.policy_versions.last}"
        )
