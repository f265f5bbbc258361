"""log W before the first update of a batch, one case after another on one layout.

--cases is a JSON file: {name: [flags]}. Each case trains two batches of one mini-batch; the second one is
prepared with weights that the first has changed. --unsorted takes the router back to what megatron-core has
without its diff.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from common import hand_back, make_policy, read_samples, start_megatron

from megatron_vespo.types import VersionSpans

BATCHES = 2


def with_routes(samples: list, policy) -> list:
    """The samples with routes as an engine would send them: those that the routers choose now."""
    routes = policy.chosen_experts([dataclasses.replace(s, replays=False) for s in samples])
    return [
        dataclasses.replace(
            sample,
            routed_experts=chosen[:-1].astype(np.uint8),
            routes_version=policy.iteration,
        )
        for sample, chosen in zip(samples, routes, strict=True)
    ]


def log_w(policy, samples: list) -> list[np.ndarray]:
    """[num_samples] of each batch, before its update."""
    found = []
    for _ in range(BATCHES):
        batch = [
            dataclasses.replace(s, policy_versions=VersionSpans.single(policy.iteration, s.num_trained))
            for s in samples
        ]
        if policy.args.routing_replay == "R3":
            batch = with_routes(batch, policy)
        mini_batch = policy.pack(batch)
        policy.compute_old_log_probs(mini_batch)
        found.append(policy.train_step(mini_batch).log_w)
    return found


def unsort_without_gradients() -> None:
    topk = torch.topk
    torch.topk = lambda *args, **options: topk(*args, **options | {"sorted": torch.is_grad_enabled()})


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--unsorted", action="store_true")
    options, flags = parser.parse_known_args()
    if options.unsorted:
        unsort_without_gradients()
    results = {}
    for name, more in json.loads(options.cases.read_text()).items():
        args = start_megatron([*flags, *more])
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
        from megatron.core.rerun_state_machine import destroy_rerun_state_machine
        from megatron.training.global_vars import destroy_global_vars

        policy = make_policy(args)
        results[name] = np.stack(log_w(policy, read_samples(options.samples)))
        destroy_global_vars()
        destroy_num_microbatches_calculator()
        destroy_rerun_state_machine()
        print(name, np.abs(results[name]).max(), file=sys.stderr, flush=True)
    hand_back(**results)


if __name__ == "__main__":
    main()
