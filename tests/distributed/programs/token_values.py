"""Two optimizer steps on one layout that record the values of all tokens, and two that do not.

Hands back this rank's values of step i as "i pi" and so on. With --random-routes the samples carry routes as
if an engine had sent them, and "chosen" has the experts that the routers would have chosen.
"""

from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np
from common import hand_back, make_policy, read_samples, start_megatron
from replay import give_random_routes, lose_routes


def main() -> None:
    from argparse import ArgumentParser
    from pathlib import Path

    from megatron_vespo.algorithms.losses.settings import LossSettings
    from megatron_vespo.trainer.policy import MegatronPolicy

    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--random-routes", action="store_true")
    parser.add_argument("--lost", action="store_true")
    parser.add_argument("--plain", action="store_true")
    options, flags = parser.parse_known_args()
    args = start_megatron(flags)
    samples = read_samples(options.samples)
    policy = (
        make_policy(args)
        if options.plain
        else MegatronPolicy(args, LossSettings.of(args), records_tokens=True)
    )
    if options.random_routes:
        give_random_routes(samples, args)
    if options.lost:
        lose_routes(samples[::5])
    results = {}
    size = len(samples) // 2
    prepared = [policy.pack(samples[:size]), policy.pack(samples[size:])]
    if args.ratio_denominator != "rollout":
        for mini_batch in prepared:
            policy.compute_old_log_probs(mini_batch)
    for i, mini_batch in enumerate(prepared):
        if options.random_routes or args.routing_replay == "R2":
            part = samples[:size] if i == 0 else samples[size:]
            routing, policy.args.routing_replay = policy.args.routing_replay, None
            results[f"{i} chosen"] = np.concatenate([c[:-1] for c in policy.chosen_experts(part)])
            policy.args.routing_replay = routing
        step = policy.train_step(mini_batch)
        for name in ("log_w", "loss", "grad_norm", "log_mismatch_in_w", "log_mismatch"):
            results[f"{i} {name}"] = getattr(step, name)
        if policy.recorded is not None:
            for field in fields(policy.recorded):
                value = getattr(policy.recorded, field.name)
                if value is not None:
                    results[f"{i} {field.name}"] = value
    results["given"] = np.frombuffer(pickle.dumps([s.routed_experts for s in samples]), np.uint8)
    hand_back(**results)


if __name__ == "__main__":
    main()
