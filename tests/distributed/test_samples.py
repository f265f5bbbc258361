"""Samples that must not be trained on are refused by name, before any rank computes."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

import numpy as np
import pytest

from megatron_vespo.types import TokenSupports, VersionSpans
from tests.support.builders import make_sample, make_segments, make_supports

ARGS = Namespace(
    max_tokens_per_gpu=4,
    context_parallel_size=2,
    vocab_size=50,
    num_layers=2,
    moe_router_topk=2,
    num_experts=6,
    moe_layer_freq=1,
)
ROUTES = np.tile(np.array([5, 0], np.uint8), (6, 2, 1))
SAMPLE = make_sample(
    policy_versions=VersionSpans.single(3, 4), group_id=9, routed_experts=ROUTES, routes_version=3
)


def with_first_layer_dense() -> Namespace:
    return Namespace(**vars(ARGS) | {"moe_layer_freq": [0, 1]})


def repeated() -> np.ndarray:
    routes = ROUTES.copy()
    routes[2, 1] = 4
    return routes


@pytest.fixture(scope="module")
def check():
    from megatron_vespo.trainer.samples import check_sample

    return check_sample


def test_a_sound_sample_passes(check):
    check(SAMPLE, "sample 0", ARGS, needs_routes=True)
    check(dataclasses.replace(SAMPLE, routed_experts=None), "sample 0", ARGS, needs_routes=False)
    lost = dataclasses.replace(SAMPLE, routed_experts=None, routes_version=None, replays=False)
    check(lost, "sample 0", ARGS, needs_routes=True)
    restricted = dataclasses.replace(SAMPLE, supports=make_supports([3], [0, 4, 49], [4, 5], [6]))
    check(restricted, "sample 0", ARGS, needs_routes=True)
    holes = {"segments": make_segments(0, 1, 2, 1), "behavior_log_probs": np.zeros(2, np.float32)}
    check(dataclasses.replace(SAMPLE, **holes), "sample 0", ARGS, needs_routes=True)
    longest = {"token_ids": np.arange(8), "prompt_length": 4}
    check(dataclasses.replace(SAMPLE, **longest), "sample 0", ARGS, needs_routes=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"token_ids": np.arange(9), "prompt_length": 5},
            "has 9 tokens, more than --max-tokens-per-gpu x --context-parallel-size = 8: raise one of them "
            "or shorten the completions",
        ),
        (
            {"old_log_probs": np.zeros(3, np.float32)},
            "has 3 old_log_probs for 4 sampled tokens",
        ),
        (
            {"token_advantages": np.array([0, 1, np.inf, 0], np.float32)},
            "has 1 non-finite token_advantages, the first one is inf at sampled token 2",
        ),
        (
            {"old_log_probs": np.array([0, np.nan, 0, 0], np.float32)},
            "has 1 non-finite old_log_probs, the first one is nan at sampled token 1",
        ),
        (
            {"segments": make_segments(1, 1, 1)},
            "has segments of 3 tokens for 4 tokens after the prompt",
        ),
        (
            {"segments": make_segments(0, 4)},
            "has no token that the policy sampled: nothing of it can be trained on",
        ),
        (
            {"segments": make_segments(1, 1, 2)},
            "has 4 behavior_log_probs for 3 sampled tokens",
        ),
        ({"supports": make_supports([3], [4], [5])}, "has supports of 3 tokens for 4 sampled tokens"),
        ({"supports": make_supports([3], [], [5], [6])}, "has an empty support at sampled token 1"),
        (
            {"supports": TokenSupports(np.ones(4, np.int32), np.full(5, 5, np.int32))},
            "has supports of 4 ids by their counts, but 5 ids",
        ),
        (
            {"supports": make_supports([3], [4], [5, 50], [6])},
            "has the id 50 in the support of sampled token 2, the vocabulary has 0 to 49",
        ),
        (
            {"supports": make_supports([3], [-1, 4], [5], [6])},
            "has the id -1 in the support of sampled token 1, the vocabulary has 0 to 49",
        ),
        (
            {"supports": make_supports([3], [4, 7], [5, 9, 8], [6])},
            "has ids that do not ascend in the support of sampled token 2",
        ),
        (
            {"supports": make_supports([3], [4, 4], [5], [6])},
            "has ids that do not ascend in the support of sampled token 1",
        ),
        (
            {"supports": make_supports([3], [4, 7], [4, 9], [6])},
            "has the token 5 at sampled token 2, whose support does not include it",
        ),
        ({"routed_experts": None}, "has no routed_experts, --routing-replay R3 needs the engine's"),
        (
            {"routed_experts": ROUTES[:5]},
            "has routed_experts uint8 [5, 2, 2], expected uint8 [6, 2, 2]: tokens but the last, layers, "
            "experts per token",
        ),
        (
            {"routed_experts": ROUTES.astype(np.int32)},
            "has routed_experts int32 [6, 2, 2], expected uint8 [6, 2, 2]: tokens but the last, layers, "
            "experts per token",
        ),
        ({"routed_experts": ROUTES + np.uint8(1)}, "was routed to expert 6, there are 6"),
        ({"routed_experts": repeated()}, "has a token with the same expert twice in its routed_experts"),
        (
            {"routes_version": 2},
            "has routes of policy version 2, its last token is of version 3",
        ),
        (
            {"routes_version": None},
            "has routes of policy version None, its last token is of version 3",
        ),
    ],
)
def test_what_is_wrong_is_named(check, changes, message):
    with pytest.raises(ValueError) as error:
        check(dataclasses.replace(SAMPLE, **changes), "sample 5", ARGS, needs_routes=True)
    assert str(error.value) == f"sample 5 (group 9) {message}"


def test_engines_say_zeros_of_layers_without_experts(check):
    """Which come first; in the others an expert may still come only once."""
    routes = ROUTES.copy()
    routes[:, 0] = 0
    sample = dataclasses.replace(SAMPLE, routed_experts=routes)
    check(sample, "sample 5", with_first_layer_dense(), needs_routes=True)
    for args, wrong in ((ARGS, routes), (with_first_layer_dense(), repeated())):
        with pytest.raises(ValueError, match="the same expert twice"):
            check(dataclasses.replace(SAMPLE, routed_experts=wrong), "sample 5", args, needs_routes=True)
