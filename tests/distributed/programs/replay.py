"""Routing replay on one layout: which experts ran in every pass of a training step, recomputation included.

With --random-routes the samples carry routes as if an engine had sent them; --lost some, or all, of them are
lost again.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from common import hand_back, start_program


def give_random_routes(samples: list, args) -> None:
    draw = np.random.default_rng(5)
    for sample in samples:
        scores = draw.random((sample.num_tokens - 1, args.num_layers, args.num_experts))
        sample.routed_experts = scores.argsort(-1)[..., : args.moe_router_topk].astype(np.uint8)
        sample.routes_version = sample.policy_versions.last


def lose_routes(samples: list) -> None:
    for sample in samples:
        sample.routed_experts, sample.routes_version, sample.replays = None, None, False


def _given(sample, args) -> np.ndarray:
    """uint8 [P + C - 1, L, K], ascending; 255 where the routers choose."""
    if not sample.replays:
        return np.full((sample.num_tokens - 1, args.num_layers, args.moe_router_topk), 255, np.uint8)
    return np.sort(sample.routed_experts, axis=-1)


class RouterCalls:
    """Counts what each router of this rank answered, pass after pass."""

    def __init__(self, model: list):
        from megatron.core.transformer.moe.router import TopKRouter

        self.answers: dict[int, Counter] = {}
        for chunk in model:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router, inputs, output) -> None:
        answers = self.answers.setdefault(router.layer_number, Counter())
        answers[output[1].to(torch.uint8).numpy().tobytes()] += 1

    def take(self) -> dict[int, Counter]:
        taken, self.answers = self.answers, {}
        return taken


def passes(seen: dict[int, Counter], old: dict[int, Counter]) -> float:
    """How often every answer of the old policy came back; -1 if not equally often, or if others came."""
    if any(seen[layer].keys() != answers.keys() for layer, answers in old.items()):
        return -1
    ratios = {
        seen[layer][answer] / count for layer, answers in old.items() for answer, count in answers.items()
    }
    return ratios.pop() if len(ratios) == 1 else -1


def main() -> None:
    options, policy, samples = start_program(random_routes=bool, lost=str)
    args = policy.args
    if options.random_routes:
        give_random_routes(samples, args)
    if options.lost:  # "some" leaves packs of both kinds, and mixed ones
        lose_routes([s for i, s in enumerate(samples) if options.lost == "all" or i % 5 < 2])
    results = {"log_probs": np.concatenate(policy.log_probs(samples))}
    results["chosen"] = np.concatenate([c[:-1] for c in policy.chosen_experts(samples)])
    if options.random_routes:
        results["given"] = np.concatenate([_given(sample, args) for sample in samples])

    size = len(samples) // 2
    prepared = [policy.pack(samples[:size]), policy.pack(samples[size:])]
    calls = RouterCalls(policy.model)
    old_routes = []
    for mini_batch in prepared:
        policy.compute_old_log_probs(mini_batch)
        old_routes.append(calls.take())
    steps = []
    for mini_batch, old in zip(prepared, old_routes, strict=True):
        steps.append(policy.train_step(mini_batch))
        results.setdefault("passes", []).append(passes(calls.take(), old))
    results["chosen_after"] = np.concatenate([c[:-1] for c in policy.chosen_experts(samples)])
    for name in ("loss", "grad_norm", "log_w"):
        results[name] = np.array([getattr(step, name) for step in steps])
    hand_back(**results)


if __name__ == "__main__":
    main()
